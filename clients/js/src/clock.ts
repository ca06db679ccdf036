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

/** One timer that is set again, or stopped. */
export class Timer {
  #handle: unknown;

  constructor(
    private readonly clock: Clock,
    private readonly callback: () => void,
  ) {}

  set(ms: number): void {
    this.stop();
    this.#handle = this.clock.setTimeout(() => {
      this.#handle = undefined;
      this.callback();
    }, ms);
  }

  stop(): void {
    this.clock.clearTimeout(this.#handle);
    this.#handle = undefined;
  }
}
