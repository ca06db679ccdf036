// Why something was not done, and whether it may have been done all the same.

import type { ErrorFrame } from "./protocol.js";

/**
 * - `refused`: the gateway said no, nothing was done.
 * - `unknown`: it may or may not have been done.
 * - `not_sent`: the command never left.
 */
export type Outcome = "refused" | "unknown" | "not_sent";

export class HubcastError extends Error {
  override readonly name = "HubcastError";

  constructor(
    /**
     * The gateway's `bad_request`, `unknown_type`, `forbidden`, `unauthorized`, `limit_exceeded`, `rate_limited`,
     * `unavailable` or `too_large`; or the client's own `disconnected`, `timeout`, `closed` or `failed`.
     */
    readonly code: string,
    message: string,
    readonly outcome: Outcome,
    /** When trying again makes sense, in milliseconds. */
    readonly retryAfterMs?: number,
    readonly channel?: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  /** @internal It is only that the connection ended, and that is told otherwise. */
  get isEnd(): boolean {
    return this.code === "disconnected" || this.code === "closed";
  }

  /** @internal */
  static of(frame: ErrorFrame): HubcastError {
    // `unavailable` also stands for a Redis that did not answer in time.
    const outcome = frame.outcome === "unknown" ? "unknown" : "refused";
    return new HubcastError(frame.code, frame.message, outcome, frame.retry_after_ms, frame.channel);
  }

  /** @internal Something outside the protocol failed: a hook, a URL, a frame that is no JSON. */
  static failed(what: string, cause: unknown): HubcastError {
    const why = cause instanceof Error ? cause.message : String(cause);
    return new HubcastError("failed", `${what}: ${why}`, "not_sent", undefined, undefined, { cause });
  }
}
