// Requests made while there is no connection: they leave in their order when there is one, or not at all.

import { Timer } from "./clock.js";
import type { Connection } from "./connection.js";
import { HubcastError } from "./errors.js";
import type { Settings } from "./options.js";
import type { Reply } from "./requests.js";

const HELD_MAX = 1_000;

interface Request {
  command: string;
  reply: Reply;
  timer: Timer;
}

export class Held {
  readonly #requests = new Set<Request>();

  constructor(private readonly settings: Settings) {}

  add(command: string, reply: Reply): void {
    if (this.#requests.size >= HELD_MAX) {
      reply(new HubcastError("limit_exceeded", "too many requests wait for a connection", "not_sent"));
      return;
    }
    const timer = new Timer(this.settings.clock, () => {
      this.#requests.delete(request);
      reply(new HubcastError("timeout", "no connection in time", "not_sent"));
    });
    const request = { command, reply, timer };
    timer.set(this.settings.requestTimeoutMs);
    this.#requests.add(request);
  }

  release(connection: Connection): void {
    for (const { command, reply } of this.#take()) {
      connection.queue(command, reply, this.settings.requestTimeoutMs);
    }
  }

  /** There will be no connection. */
  refuse(): void {
    for (const { reply } of this.#take())
      reply(new HubcastError("closed", "the client was closed", "not_sent"));
  }

  #take(): Request[] {
    const requests = [...this.#requests];
    this.#requests.clear();
    for (const { timer } of requests) timer.stop();
    return requests;
  }
}
