// What waits for an answer on one connection. Answers may come out of order: the id tells whose they are.

import { type Clock, Timer } from "./clock.js";
import { HubcastError } from "./errors.js";
import type { ServerFrame } from "./protocol.js";

export type Reply = (answer: ServerFrame | HubcastError) => void;

export class Requests {
  #lastId = 0;
  readonly #waiting = new Map<number, { reply: Reply; timer: Timer }>();

  constructor(private readonly clock: Clock) {}

  /** Gives the id that the command has to carry. Without a time it may be answered whenever that is. */
  add(reply: Reply, timeoutMs?: number): number {
    this.#lastId += 1;
    const id = this.#lastId;
    const late = new HubcastError("timeout", "no answer in time, outcome unknown", "unknown");
    const timer = new Timer(this.clock, () => this.#settle(id, late));
    if (timeoutMs !== undefined) timer.set(timeoutMs);
    this.#waiting.set(id, { reply, timer });
    return id;
  }

  /** False if the frame is no answer. One that comes too late is passed over. */
  answered(frame: ServerFrame): boolean {
    if (frame.id === undefined) return false;
    this.#settle(Number(frame.id), frame.type === "error" ? HubcastError.of(frame) : frame);
    return true;
  }

  /** Nobody cares about the answer any more. */
  forget(id: number): void {
    this.#waiting.get(id)?.timer.stop();
    this.#waiting.delete(id);
  }

  fail(error: HubcastError): void {
    for (const id of [...this.#waiting.keys()]) this.#settle(id, error);
  }

  #settle(id: number, answer: ServerFrame | HubcastError): void {
    const waiting = this.#waiting.get(id);
    this.forget(id);
    waiting?.reply(answer);
  }
}
