// Delays between tries: full jitter, doubling up to a bound.

export interface BackoffLimits {
  /** The first delay is random between 0 and this. */
  baseMs: number;
  /** No delay is longer. */
  maxMs: number;
}

export class Backoff {
  #failures = 0;

  constructor(
    private readonly limits: BackoffLimits,
    private readonly random: () => number,
  ) {}

  /** The delay before the next try: `atLeastMs`, then the jitter. */
  next(atLeastMs = 0): number {
    const ceiling = Math.min(this.limits.maxMs, this.limits.baseMs * 2 ** this.#failures);
    this.#failures += 1;
    return atLeastMs + this.random() * ceiling;
  }

  reset(): void {
    this.#failures = 0;
  }
}
