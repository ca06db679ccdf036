// What the queries of a client ask and answer, in the words of JavaScript.

import type { GapFrame, HistoryFrame, PresenceFrame } from "./protocol.js";
import { Publication } from "./publication.js";

export interface Published {
  /** The publication's position, where the channel has history. */
  cursor?: string;
}

export interface PresenceQuery {
  /** Members in the answer: 100 where nothing is said, at most 1,000, 0 for the counts alone. */
  limit?: number;
  /** The `page` of the answer before. */
  page?: string;
}

/** Who is there: a user, or the connection of one that has none. */
export interface PresenceMember {
  user?: string;
  connectionId?: string;
}

export interface Presence {
  users: number;
  connections: number;
  members: PresenceMember[];
  /** Ask for the next page with it; `null` at the end. */
  page: string | null;
}

export interface HistoryQuery {
  /** What was published after this cursor, … */
  after?: string;
  /** … or before this one. */
  before?: string;
  /** 100 where nothing is said, at most 1,000. */
  limit?: number;
}

export interface History<Data = unknown> {
  /** Oldest first. */
  publications: Publication<Data>[];
  /** Places in between where the gateway knows of a loss. */
  gaps: Gap[];
  /** There is more in the direction that was asked for. */
  hasMore: boolean;
  /** The newest position of the channel. */
  cursor: string;
}

/** Continuity broke here: messages may be missing. Reload what you show. */
export interface Gap {
  /** The last cursor before it, where there is one. */
  after?: string;
  /** The first cursor behind it, where there is one. */
  next?: string;
  /** `slow`, `upstream` or `trimmed`. */
  reason: string;
}

export function gap({ after, next, reason }: GapFrame): Gap {
  return { ...(after !== undefined && { after }), ...(next !== undefined && { next }), reason };
}

export function history<Data>(frame: HistoryFrame): History<Data> {
  const all: History<Data> = { publications: [], gaps: [], hasMore: frame.has_more, cursor: frame.cursor };
  for (const event of frame.events) {
    if (event.type === "event") all.publications.push(new Publication<Data>(event));
    else all.gaps.push(gap(event));
  }
  return all;
}

export function member(wire: { user?: string; connection_id?: string }): PresenceMember {
  const { user, connection_id } = wire;
  return {
    ...(user !== undefined && { user }),
    ...(connection_id !== undefined && { connectionId: connection_id }),
  };
}

export function presence(frame: PresenceFrame): Presence {
  const { users, connections, members, page } = frame;
  return { users, connections, members: members.map(member), page: page ?? null };
}
