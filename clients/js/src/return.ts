// Whether and when a client comes back.

import { Backoff } from "./backoff.js";
import { asksForRest, type Close, comesBack, UNAUTHORIZED } from "./close.js";
import { guarded } from "./guarded.js";
import type { Settings } from "./options.js";

/** A connection that lasted this long was a good one: the next delay is short again. */
const GOOD_CONNECTION_MS = 10_000;

/** How long after the announced time an instance that drains may still flush what it accepted. */
const DRAIN_GRACE_MS = 5_000;

export class Return {
  readonly #backoff: Backoff;
  #attempt = 0;
  #openSince: number | undefined;
  /** Our own random moment within the time that a drain gives, and its end. */
  #drain: { moment: number; end: number } | undefined;
  #isRefused = false;

  constructor(private readonly settings: Settings) {
    this.#backoff = new Backoff(settings.backoff, settings.random);
  }

  /** The last token that the gateway judged was refused. */
  get isRefused(): boolean {
    return this.#isRefused;
  }

  /** Counts one more attempt since the last connection that was open. */
  attempt(): number {
    this.#attempt += 1;
    return this.#attempt;
  }

  opened(): void {
    this.#attempt = 0;
    this.#openSince = this.settings.clock.now();
    this.#isRefused = false;
  }

  /** Somebody who knows better says that now is the time. */
  reset(): void {
    this.#backoff.reset();
    this.#attempt = 0;
    this.#isRefused = false;
    this.#openSince = undefined;
    this.#drain = undefined;
  }

  /** The connection ends within `retryAfterMs`. Returns when it is time to go without being told. */
  draining(retryAfterMs: number): number {
    const { clock, random } = this.settings;
    const now = clock.now();
    this.#drain = { moment: now + random() * retryAfterMs, end: now + retryAfterMs };
    return retryAfterMs + DRAIN_GRACE_MS;
  }

  /** How long to wait after this close; `null`: for ever. */
  delay(close: Close): number | null {
    const { clock, shouldReconnect } = this.settings;
    const openMs = this.#openSince === undefined ? 0 : clock.now() - this.#openSince;
    const drain = this.#drain;
    this.#openSince = undefined;
    this.#drain = undefined;
    const byDefault = comesBack(close.code) || this.#mayAskForToken(close.code);
    if (close.code === UNAUTHORIZED) this.#isRefused = true;
    if (!guarded(() => shouldReconnect?.(close, byDefault) ?? byDefault, byDefault)) return null;
    if (drain) return this.#drainDelay(drain);
    const needsRest = asksForRest(close.code);
    if (openMs >= GOOD_CONNECTION_MS && !needsRest) this.#backoff.reset();
    // Of the second in which a user is revoked, new tokens are refused as well.
    const waitsFirst = needsRest || close.code === UNAUTHORIZED;
    return this.#backoff.next(waitsFirst ? this.settings.backoff.baseMs : 0);
  }

  /** A new token may help, unless the one that was refused is new. */
  #mayAskForToken(code: number): boolean {
    return code === UNAUTHORIZED && this.settings.getToken !== undefined && !this.#isRefused;
  }

  /** The moment that was drawn when the drain was announced; if it is over, soon, but still within the time. */
  #drainDelay({ moment, end }: { moment: number; end: number }): number {
    const { backoff, clock, random } = this.settings;
    const now = clock.now();
    this.#backoff.reset();
    if (moment > now) return moment - now;
    return random() * (end > now ? Math.min(backoff.baseMs, end - now) : backoff.baseMs);
  }
}
