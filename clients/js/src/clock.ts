// Time, as tests may replace it.

export interface Clock {
  now(): number;
  setTimeout(callback: () => void, ms: number): unknown;
  clearTimeout(timer: unknown): void;
}

export const SYSTEM_CLOCK: Clock = {
  now: () => performance.now(),
  setTimeout: (callback, ms) => setTimeout(callback, ms),
  clearTimeout: (timer) => clearTimeout(timer as ReturnType<typeof setTimeout>),
};

/** What is set for longer, platforms let fire at once. */
const TIMER_MS_MAX = 2 ** 31 - 1;

/** One timer that is set again, or stopped. However long it is: in pieces. */
export class Timer {
  #handle: unknown;

  constructor(
    private readonly clock: Clock,
    private readonly callback: () => void,
  ) {}

  set(ms: number): void {
    this.stop();
    const leftMs = ms - TIMER_MS_MAX;
    const piece = () => {
      this.#handle = undefined;
      if (leftMs > 0) this.set(leftMs);
      else this.callback();
    };
    this.#handle = this.clock.setTimeout(piece, Math.min(ms, TIMER_MS_MAX));
  }

  stop(): void {
    this.clock.clearTimeout(this.#handle);
    this.#handle = undefined;
  }
}
