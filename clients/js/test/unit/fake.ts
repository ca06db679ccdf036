// A little world for a client: a clock that stands still, chance that is chosen, and sockets whose other side is
// the test.

import { Client, type ClientEvents, type Clock, type Options, type Status } from "../../src/index.js";

export class FakeClock implements Clock {
  #now = 0;
  #timers = new Map<number, { at: number; callback: () => void }>();
  #lastId = 0;

  now(): number {
    return this.#now;
  }

  setTimeout(callback: () => void, ms: number): number {
    this.#lastId += 1;
    // As platforms do.
    const kept = ms > 2 ** 31 - 1 ? 1 : ms;
    this.#timers.set(this.#lastId, { at: this.#now + kept, callback });
    return this.#lastId;
  }

  clearTimeout(timer: unknown): void {
    this.#timers.delete(timer as number);
  }

  get timers(): number {
    return this.#timers.size;
  }

  /** Lets time pass, with every timer at its moment and everything that follows from it. */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms;
    for (;;) {
      const due = [...this.#timers]
        .filter(([, timer]) => timer.at <= end)
        .sort(([, a], [, b]) => a.at - b.at)[0];
      if (due === undefined) break;
      this.#timers.delete(due[0]);
      this.#now = due[1].at;
      due[1].callback();
      await settled();
    }
    this.#now = end;
  }
}

/** Everything that waits for no more than the microtask queue has happened. */
export function settled(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

export type Frame = { type: string; id?: number; [member: string]: unknown };

/** The client's end of a connection; the methods below `--- the server ---` are the test's. */
export class FakeSocket {
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onerror: ((event: { message?: string }) => void) | null = null;
  onclose: ((event: { code: number; reason: string }) => void) | null = null;
  /** What the client said and nobody looked at yet. */
  readonly #said: Frame[] = [];
  /** Frames on the wire, each with one or more commands. */
  frames = 0;
  closedWith: { code?: number | undefined; reason?: string | undefined } | undefined;

  constructor(
    readonly url: string,
    readonly protocol: string,
  ) {}

  send(data: string): void {
    this.frames += 1;
    const commands: unknown = JSON.parse(data);
    this.#said.push(...(Array.isArray(commands) ? commands : [commands]));
  }

  close(code?: number, reason?: string): void {
    this.closedWith = { code, reason };
  }

  // --- the server ---

  say(frame: object): void {
    this.onmessage?.({ data: JSON.stringify(frame) });
  }

  sayText(data: string): void {
    this.onmessage?.({ data });
  }

  welcome(limits: object = {}, members: object = {}): void {
    this.say({
      type: "welcome",
      connection_id: "c1",
      instance_id: "i1",
      ping_interval_ms: 54_000,
      limits: { message_bytes: 65_536, publish_bytes: 1_048_576, subscriptions: 128, ...limits },
      ...members,
    });
  }

  /** What the client said since the last time. */
  async heard(): Promise<Frame[]> {
    await settled();
    return this.#said.splice(0);
  }

  /** The one command that the client said. */
  async heardOne(type: string): Promise<Frame> {
    const heard = await this.heard();
    const [first] = heard;
    if (heard.length !== 1 || first?.type !== type) {
      throw new Error(`expected one ${type}, heard ${JSON.stringify(heard)}`);
    }
    return first;
  }

  end(code: number, reason = ""): void {
    this.onclose?.({ code, reason });
  }
}

export class World {
  readonly clock = new FakeClock();
  readonly sockets: FakeSocket[] = [];
  readonly statuses: Status[] = [];
  readonly errors: ClientEvents["error"][] = [];
  readonly client: Client;
  /** What chance says next. */
  random = 0.5;

  constructor(options: Options = {}, urls: ConstructorParameters<typeof Client>[0] = "ws://test/ws") {
    const { sockets } = this;
    class Socket extends FakeSocket {
      constructor(url: string, protocol: string) {
        super(url, protocol);
        sockets.push(this);
      }
    }
    this.client = new Client(urls, {
      WebSocket: Socket,
      clock: this.clock,
      random: () => this.random,
      pingIntervalMs: 0,
      ...options,
    });
    this.client.on("status", (status) => this.statuses.push(status));
    this.client.on("error", (error) => this.errors.push(error));
  }

  /** A world whose client is connected. */
  static async open(options: Options = {}, urls?: ConstructorParameters<typeof Client>[0]): Promise<World> {
    const world = new World(options, urls);
    world.client.connect();
    await world.accept();
    return world;
  }

  get socket(): FakeSocket {
    const last = this.sockets.at(-1);
    if (last === undefined) throw new Error("no connection was begun");
    return last;
  }

  /** The server welcomes the connection that was begun last. */
  async accept(): Promise<FakeSocket> {
    await settled();
    this.socket.welcome();
    return this.socket;
  }

  /** The delay that the client chose after the last close. */
  get retryInMs(): number | null {
    const status = this.client.status;
    if (status.state !== "closed") throw new Error(`it is ${status.state}`);
    return status.retryInMs;
  }

  /** Lets the delay pass and accepts. */
  async comeBack(): Promise<FakeSocket> {
    await this.clock.advance(this.retryInMs ?? Number.NaN);
    return this.accept();
  }
}
