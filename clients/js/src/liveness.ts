// Whether the other side is still there. A page does not see the gateway's pings, so it sends its own when all is
// silent: a connection that only listens would otherwise never notice that it is dead.

import { type Clock, Timer } from "./clock.js";

export class Liveness {
  #seenAt: number;
  readonly #silence: Timer;
  readonly #pong: Timer;
  #isProbing = false;

  constructor(
    private readonly clock: Clock,
    private readonly times: { pingIntervalMs: number; pongTimeoutMs: number },
    private readonly ping: () => void,
    dead: () => void,
  ) {
    this.#seenAt = clock.now();
    this.#silence = new Timer(clock, () => this.#check());
    this.#pong = new Timer(clock, dead);
    this.#wait(times.pingIntervalMs);
  }

  /** Something arrived. */
  seen(): void {
    this.#seenAt = this.clock.now();
    if (!this.#isProbing) return;
    this.#isProbing = false;
    this.#pong.stop();
    this.#wait(this.times.pingIntervalMs);
  }

  /** Asks now: the page or the network woke up. */
  probe(): void {
    if (this.#isProbing) return;
    this.#isProbing = true;
    this.#silence.stop();
    this.#pong.set(this.times.pongTimeoutMs);
    this.ping();
  }

  stop(): void {
    this.#silence.stop();
    this.#pong.stop();
  }

  /** One timer an interval, not one a message: it looks how long the silence is. */
  #check(): void {
    const left = this.#seenAt + this.times.pingIntervalMs - this.clock.now();
    if (left > 0) this.#wait(left);
    else this.probe();
  }

  #wait(ms: number): void {
    if (this.times.pingIntervalMs > 0) this.#silence.set(ms);
  }
}
