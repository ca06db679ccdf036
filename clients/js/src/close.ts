// What a close code asks of a client: the one table.

/** How a connection ended. */
export interface Close {
  /** The close code; 1006 where there was none: the network, a timeout of ours, a refused handshake. */
  code: number;
  reason: string;
}

/** No close frame arrived. */
export const LOST = 1006;
export const NORMAL = 1000;
export const UNAUTHORIZED = 3000;

const POLICY = 1008;
const OVERLOAD = 1013;
const TIMEOUT = 3008;
const SLOW_CONSUMER = 4101;

/**
 * Whether a client comes back after this code, as long as `shouldReconnect` says nothing else.
 *
 * What somebody decided is final: 1000, and 3000 to 4999 (3000 unauthorized, 3003 forbidden, which is also what
 * `POST /api/disconnect` says by default, and what the backend chose for it). The exceptions are 3008 (nothing arrived
 * in time) and 4101 (slow consumer). Whatever else happened will pass, also 1008 (it did too much of something).
 */
export function comesBack(code: number): boolean {
  if (code === TIMEOUT || code === SLOW_CONSUMER) return true;
  return code !== NORMAL && !(code >= 3000 && code <= 4999);
}

/** These say that there is too much to do: the delay goes on growing, however long the connection lasted. */
export function asksForRest(code: number): boolean {
  return code === POLICY || code === OVERLOAD || code === SLOW_CONSUMER;
}
