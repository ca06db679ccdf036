// Where a client is between connecting and closed, and the events that tell it.

import type { HubcastError } from "./errors.js";

export interface Limits {
  /** Largest message to the gateway. */
  messageBytes: number;
  /** Largest payload of a publication. */
  publishBytes: number;
  subscriptions: number;
}

export type Status =
  /** Nobody called `connect()` yet. */
  | { state: "idle" }
  /** `attempt` counts from 1 since the last connection that was open. */
  | { state: "connecting"; attempt: number }
  | { state: "open"; connectionId: string; instanceId: string; limits: Limits }
  /** The instance goes away soon. Everything still works, and the client comes back elsewhere by itself. */
  | { state: "draining"; retryAfterMs: number }
  /** `retryInMs` is when the client tries again; `null` if it does not. */
  | { state: "closed"; code: number; reason: string; retryInMs: number | null };

export interface ClientEvents {
  status: Status;
  /** What failed without a promise to reject. Nobody listens: it goes to the console. */
  error: HubcastError;
}
