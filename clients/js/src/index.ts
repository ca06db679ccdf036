// The public names of the client of the Hubcast gateway. Reading order: client, subscription, connection.

export type {
  Gap,
  History,
  HistoryQuery,
  Presence,
  PresenceMember,
  PresenceQuery,
  Published,
} from "./answers.js";
export { Client } from "./client.js";
export type { Clock } from "./clock.js";
export type { Close } from "./close.js";
export { comesBack } from "./close.js";
export { HubcastError, type Outcome } from "./errors.js";
export type {
  GetToken,
  Options,
  TokenRequest,
  Urls,
  WebSocketConstructor,
  WebSocketLike,
} from "./options.js";
export type { Publication } from "./publication.js";
export type { ClientEvents, Limits, Status } from "./status.js";
export type { Subscribed, SubscribeOptions, Subscription, SubscriptionEvents } from "./subscription.js";
