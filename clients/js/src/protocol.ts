// The frames of `hubcast.v1` as they are on the wire (README of the gateway, "Protocol").

export const SUBPROTOCOL = "hubcast.v1";

/** What a client sends; its request id is added by the connection. */
export type Command =
  | { type: "subscribe"; channel: string; after?: string; token?: string }
  | { type: "unsubscribe"; channel: string }
  | { type: "publish"; channel: string; data: unknown }
  | { type: "presence"; channel: string; limit?: number; page?: string }
  | { type: "history"; channel: string; after?: string; before?: string; limit?: number }
  | { type: "auth"; token: string }
  | { type: "ping" };

export function encode(command: Command): string {
  return JSON.stringify(command);
}

export interface EventFrame {
  type: "event";
  channel: string;
  cursor?: string;
  data?: unknown;
  data_base64?: string;
}

export interface WelcomeFrame {
  type: "welcome";
  connection_id: string;
  instance_id: string;
  ping_interval_ms: number;
  limits: { message_bytes: number; publish_bytes: number; subscriptions: number };
  /** Where tokens are needed: whether the handshake showed one, whose it is, and how long it is good for. */
  authenticated?: boolean;
  user?: string;
  expires_in_ms?: number;
}

export interface AuthenticatedFrame {
  type: "authenticated";
  user?: string;
  expires_in_ms?: number;
}

export interface SubscribedFrame {
  type: "subscribed";
  channel: string;
  cursor?: string;
  recovered?: boolean;
}

export interface GapFrame {
  type: "gap";
  channel: string;
  after?: string;
  next?: string;
  reason: string;
}

export interface MemberFrame {
  type: "join" | "leave";
  channel: string;
  user?: string;
  connection_id?: string;
}

export interface ErrorFrame {
  type: "error";
  code: string;
  message: string;
  channel?: string;
  retry_after_ms?: number;
  /** `unknown`: it may have been done all the same. */
  outcome?: string;
}

export interface PresenceFrame {
  type: "presence";
  users: number;
  connections: number;
  members: { user?: string; connection_id?: string }[];
  page: string | null;
}

export interface HistoryFrame {
  type: "history";
  events: (EventFrame | GapFrame)[];
  has_more: boolean;
  cursor: string;
}

/** What the server sends. Types that a later server adds are passed over. */
export type ServerFrame = { id?: string | number } & (
  | WelcomeFrame
  | AuthenticatedFrame
  | EventFrame
  | SubscribedFrame
  | GapFrame
  | MemberFrame
  | ErrorFrame
  | PresenceFrame
  | { type: "unsubscribed"; channel: string; reason?: string }
  | { type: "published"; cursor?: string }
  | HistoryFrame
  | { type: "pong" }
  | { type: "draining"; retry_after_ms: number }
);
