// A newer token for the connection that goes on, before the one it has ends.

import { Timer } from "./clock.js";
import type { Connection } from "./connection.js";
import { HubcastError } from "./errors.js";
import type { Settings } from "./options.js";
import { encode, type ServerFrame } from "./protocol.js";

/** So long before the end at least, where the token lives long enough: for `getToken`, the way, and clocks that differ. */
const MARGIN_MS = 5_000;

/** No token is asked for sooner than that after the last one. */
const PAUSE_MS = 1_000;

export class Refresh {
  readonly #timer: Timer;
  /** The one whose token is kept up. */
  #connection: Connection | undefined;
  #endsAt = 0;

  constructor(
    private readonly settings: Settings,
    private readonly report: (error: HubcastError) => void,
  ) {
    this.#timer = new Timer(settings.clock, () => void this.#refresh());
  }

  /** The connection's token is good for so long; `undefined`: nobody wants one. */
  start(connection: Connection, expiresInMs: number | undefined): void {
    this.stop();
    if (expiresInMs === undefined || this.settings.getToken === undefined) return;
    this.#connection = connection;
    this.#endsAt = this.settings.clock.now() + expiresInMs;
    this.#wait();
  }

  /** The connection is over. */
  stop(): void {
    this.#connection = undefined;
    this.#timer.stop();
  }

  /** Until most of what is left has passed. At the very end it is left to the gateway to close with 3000. */
  #wait(): void {
    const { clock, random } = this.settings;
    const left = this.#endsAt - clock.now();
    const latest = Math.max(Math.min(left * 0.8, left - MARGIN_MS), left / 2);
    const wait = Math.max(latest * (0.9 + 0.1 * random()), PAUSE_MS);
    if (wait < left) this.#timer.set(wait);
  }

  async #refresh(): Promise<void> {
    const { getToken, requestTimeoutMs } = this.settings;
    const connection = this.#connection;
    try {
      const token = await getToken?.({ isRefused: false });
      if (connection === undefined || connection !== this.#connection) return;
      if (typeof token !== "string") throw new Error("there is none");
      connection.queue(
        encode({ type: "auth", token }),
        (answer) => this.#answered(connection, answer),
        requestTimeoutMs,
      );
    } catch (error) {
      if (connection === this.#connection)
        this.#failed(HubcastError.failed("cannot refresh the token", error));
    }
  }

  #answered(connection: Connection, answer: ServerFrame | HubcastError): void {
    if (answer instanceof HubcastError) this.#failed(answer);
    else if (answer.type === "authenticated") this.start(connection, answer.expires_in_ms);
  }

  /** The connection is kept for as long as it is let; once more within that. */
  #failed(error: HubcastError): void {
    if (error.isEnd) return;
    this.#wait();
    this.report(error);
  }
}
