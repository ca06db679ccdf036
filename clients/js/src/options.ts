// What a client can be told, and what it does when it is told nothing.

import type { BackoffLimits } from "./backoff.js";
import { type Clock, SYSTEM_CLOCK } from "./clock.js";
import type { Close } from "./close.js";

/** One address, several to try in turn, or whatever a function says for this attempt. */
export type Urls = string | readonly string[] | ((attempt: number) => string | Promise<string>);

export interface TokenRequest {
  /** The gateway refused the last token, or it has expired or was revoked: one from a cache will not do. */
  isRefused: boolean;
}

/** Gives a token; `null`: there is none. */
export type GetToken = (request: TokenRequest) => string | null | Promise<string | null>;

export interface Options {
  /** Whose connection it is (`?user=`). Not for a gateway that wants tokens: they say it, and it answers this with 400. */
  user?: string;
  /**
   * Gives the connection's token: at every connect, before the last one ends, and again after 3000. `null` at a
   * connect gives up: closed with 3000.
   */
  getToken?: GetToken;
  /**
   * Where the token goes: `?token=` in the URL (default), or the `auth` command right after the welcome. Of attempts
   * that fail every second one takes the command anyhow: pages are not told that a handshake had a bad token.
   */
  tokenIn?: "query" | "command";
  /** Default: the WebSocket of the platform (browsers, Node 22 and up); else pass that of npm `ws`. */
  WebSocket?: WebSocketConstructor;
  /** How long an answer may take, and how long a request waits for a connection. Default: 10 s. */
  requestTimeoutMs?: number;
  /** How long it may take until the connection is open. Default: 10 s. */
  connectTimeoutMs?: number;
  /** Delays between attempts, full jitter. Default: the first up to 1 s, doubling up to 20 s. */
  backoff?: BackoffLimits;
  /** Silence after which the client pings. Default: what the gateway says (`ping_interval_ms`); 0: never. */
  pingIntervalMs?: number;
  /** How long nothing at all may arrive after a ping. Default: 10 s. */
  pongTimeoutMs?: number;
  /** Whether to come back after this close; `byDefault` is what the client would do. */
  shouldReconnect?: (close: Close, byDefault: boolean) => boolean;
  /** For tests. */
  clock?: Clock;
  /** For tests: between 0 and 1, like `Math.random`. */
  random?: () => number;
}

/** What is needed of a WebSocket, so that any implementation will do. */
export interface WebSocketLike {
  // biome-ignore lint/suspicious/noExplicitAny: implementations differ in the types of their events
  onopen: ((event: any) => void) | null;
  // biome-ignore lint/suspicious/noExplicitAny: see above
  onmessage: ((event: any) => void) | null;
  // biome-ignore lint/suspicious/noExplicitAny: see above
  onerror: ((event: any) => void) | null;
  // biome-ignore lint/suspicious/noExplicitAny: see above
  onclose: ((event: any) => void) | null;
  send(data: string): void;
  close(code?: number, reason?: string): void;
  /** Ends the connection without the handshake of a close; npm `ws` has it. */
  terminate?(): void;
}

export type WebSocketConstructor = new (url: string, protocols: string) => WebSocketLike;

/** Options with every default filled in. */
export type Settings = { [Name in keyof Required<Options>]: Options[Name] } & Required<
  Omit<Options, "user" | "getToken" | "pingIntervalMs" | "shouldReconnect">
>;

export function settings(options: Options): Settings {
  const WebSocket = options.WebSocket ?? (globalThis.WebSocket as WebSocketConstructor | undefined);
  if (WebSocket === undefined) throw new TypeError("there is no WebSocket here: pass one as an option");
  return {
    user: options.user,
    getToken: options.getToken,
    tokenIn: options.tokenIn ?? "query",
    WebSocket,
    requestTimeoutMs: options.requestTimeoutMs ?? 10_000,
    connectTimeoutMs: options.connectTimeoutMs ?? 10_000,
    backoff: options.backoff ?? { baseMs: 1_000, maxMs: 20_000 },
    pingIntervalMs: options.pingIntervalMs,
    pongTimeoutMs: options.pongTimeoutMs ?? 10_000,
    shouldReconnect: options.shouldReconnect,
    clock: options.clock ?? SYSTEM_CLOCK,
    random: options.random ?? Math.random,
  };
}
