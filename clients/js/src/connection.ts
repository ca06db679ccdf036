// One WebSocket from its start to its end. It tells its owner once that it is over, and nothing after that.

import { type Close, LOST } from "./close.js";
import { HubcastError } from "./errors.js";
import { Liveness } from "./liveness.js";
import type { Settings, WebSocketLike } from "./options.js";
import { encode, type ServerFrame, SUBPROTOCOL, type WelcomeFrame } from "./protocol.js";
import { type Reply, Requests } from "./requests.js";

/** Commands in one frame: the gateway answers 4,096 at most. */
const BATCH_COMMANDS_MAX = 1_000;

export interface ConnectionOwner {
  welcomed(frame: WelcomeFrame): void;
  /** What answers no request. */
  received(frame: ServerFrame): void;
  /** A frame that nobody understands. */
  puzzled(error: HubcastError): void;
  ended(close: Close): void;
}

export class Connection {
  readonly #socket: WebSocketLike;
  readonly #requests: Requests;
  readonly #encoder = new TextEncoder();
  #liveness: Liveness | undefined;
  #messageBytesMax = 0;
  #batch: string[] = [];
  #batchBytes = 0;
  #isOver = false;

  constructor(
    url: URL,
    private readonly settings: Settings,
    private readonly owner: ConnectionOwner,
  ) {
    this.#requests = new Requests(settings.clock);
    try {
      this.#socket = new settings.WebSocket(url.href, SUBPROTOCOL);
    } catch (error) {
      // Platforms name the whole URL that they do not take, and a token may be in it: errors are logged.
      const why = error instanceof Error ? error.message : String(error);
      throw new Error(url.search === "" ? why : why.replaceAll(url.search, ""));
    }
    this.#socket.onmessage = (event: { data: unknown }) => this.#received(event.data);
    this.#socket.onerror = (event: { message?: string }) => this.#erred(event.message);
    this.#socket.onclose = (event: Close) => this.#ended({ code: event.code, reason: event.reason });
  }

  /** Sends a command; whatever is queued in one go leaves in one frame. Gives its request id. */
  queue(command: string, reply: Reply, timeoutMs?: number): number {
    const id = this.#requests.add(reply, timeoutMs);
    const json = `{"id":${id},${command.slice(1)}`;
    const bytes = this.#encoder.encode(json).length + 1;
    // The gateway would close the connection.
    if (bytes + 1 > this.#messageBytesMax) {
      const message = `a message may have ${this.#messageBytesMax} bytes`;
      this.#requests.answered({ type: "error", id, code: "too_large", message });
      return id;
    }
    const isFull = this.#batchBytes + bytes + 1 > this.#messageBytesMax;
    if (isFull || this.#batch.length >= BATCH_COMMANDS_MAX) this.#flush();
    if (this.#batch.length === 0) queueMicrotask(() => this.#flush());
    this.#batch.push(json);
    this.#batchBytes += bytes;
    return id;
  }

  /** Nobody cares about the answer any more. */
  forget(id: number): void {
    this.#requests.forget(id);
  }

  /** Finds out whether the other side is still there. */
  probe(): void {
    this.#liveness?.probe();
  }

  /** Ends it in good order, for good. */
  close(code: number, reason: string): void {
    this.#flush();
    this.#socket.close(code, reason);
    this.#over("closed", "the client was closed");
  }

  /** It is over, whether the other side knows it or not. */
  fail(close: Close): void {
    if (this.#isOver) return;
    this.#ended(close, () => (this.#socket.terminate ? this.#socket.terminate() : this.#socket.close()));
  }

  /** A close follows, except that the WebSocket of older Nodes forgets it where the connection was never open. */
  #erred(message = "cannot connect"): void {
    if (this.#liveness === undefined) this.fail({ code: LOST, reason: message });
  }

  #ended(close: Close, letGo = () => {}): void {
    this.#over("disconnected", `the connection ended (${close.code} ${close.reason}), outcome unknown`);
    letGo();
    this.owner.ended(close);
  }

  #over(code: string, message: string): void {
    this.#isOver = true;
    this.#liveness?.stop();
    this.#socket.onmessage = null;
    this.#socket.onclose = null;
    this.#requests.fail(new HubcastError(code, message, "unknown"));
  }

  #received(data: unknown): void {
    this.#liveness?.seen();
    let frame: ServerFrame;
    try {
      frame = JSON.parse(data as string) as ServerFrame;
    } catch (error) {
      this.owner.puzzled(HubcastError.failed("a frame that is not JSON", error));
      return;
    }
    if (this.#requests.answered(frame)) return;
    if (frame.type === "welcome") this.#welcomed(frame);
    else this.owner.received(frame);
  }

  #welcomed(frame: WelcomeFrame): void {
    this.#messageBytesMax = frame.limits.message_bytes;
    const { clock, pingIntervalMs = frame.ping_interval_ms, pongTimeoutMs } = this.settings;
    const ping = () => this.queue(encode({ type: "ping" }), () => {});
    const dead = () => this.fail({ code: LOST, reason: "nothing arrived after a ping" });
    this.#liveness = new Liveness(clock, { pingIntervalMs, pongTimeoutMs }, ping, dead);
    this.owner.welcomed(frame);
  }

  #flush(): void {
    const [first] = this.#batch;
    if (first !== undefined && !this.#isOver) {
      this.#socket.send(this.#batch.length === 1 ? first : `[${this.#batch.join(",")}]`);
    }
    this.#batch = [];
    this.#batchBytes = 0;
  }
}
