// One channel that the application listens to, over all connections: its position, and what it is told.

import { type Gap, gap, member, type PresenceMember } from "./answers.js";
import { Backoff } from "./backoff.js";
import { Timer } from "./clock.js";
import type { Connection } from "./connection.js";
import { Cursors } from "./cursors.js";
import { Emitter } from "./emitter.js";
import { HubcastError } from "./errors.js";
import type { GetToken, Settings } from "./options.js";
import { type Command, type EventFrame, encode, type ServerFrame, type SubscribedFrame } from "./protocol.js";
import { Publication } from "./publication.js";

export interface SubscribeOptions {
  /** Resume behind this cursor, of a page that was left for example. */
  after?: string;
  /**
   * A token for this channel alone, for what the connection's does not grant. A function is asked at every subscribe,
   * and once anew if its token was refused or has expired; `null` ends the subscription.
   */
  token?: string | GetToken;
}

export interface Subscribed {
  /**
   * `true`: nothing was missed. `false`: something may have been, reload what you show. `undefined`: there was
   * nothing to miss, it is the first time.
   */
  recovered: boolean | undefined;
  /** Safe to store, where the channel has history. */
  cursor: string | undefined;
}

export interface SubscriptionEvents<Data> {
  publication: Publication<Data>;
  /** The channel is live: the first time, and after every reconnect. */
  subscribed: Subscribed;
  gap: Gap;
  join: PresenceMember;
  leave: PresenceMember;
  /** It ended, and not by `unsubscribe()`: `reason` is `backend`, or the code of the error. */
  unsubscribed: { reason: string };
  /** Nobody listens: it goes to the client. */
  error: HubcastError;
}

/** What a subscription needs of its client. */
export interface SubscriptionOwner {
  readonly settings: Settings;
  /** The connection, while it is open. */
  readonly connection: () => Connection | undefined;
  readonly add: (subscription: Subscription<never>) => void;
  readonly remove: (subscription: Subscription<never>) => void;
  readonly report: (error: HubcastError) => void;
  /** Channels whose `unsubscribe` is not answered yet. */
  readonly leaving: Set<string>;
}

/** These pass: the same command may succeed later. `failed` is a function that threw instead of giving a token. */
const PASSING = ["unavailable", "rate_limited", "failed"];

/** A new token may be good. */
const REFUSING = ["unauthorized", "forbidden"];

export class Subscription<Data = unknown> extends Emitter<SubscriptionEvents<Data>> {
  readonly channel: string;
  readonly #owner: SubscriptionOwner;
  readonly #token: string | GetToken | undefined;
  readonly #cursors = new Cursors();
  readonly #backoff: Backoff;
  readonly #retry: Timer;
  #state: "unsubscribed" | "subscribing" | "subscribed" = "unsubscribed";
  #cursor: string | undefined;
  #isResume: boolean;
  /** The id of the `subscribe` that is not answered yet. */
  #request: number | undefined;
  /** The last token was refused, or has expired. */
  #isRefused = false;
  /** Grows with every wish for a token and every end: a token that comes later is of no use. */
  #turn = 0;

  /** @internal */
  constructor(channel: string, options: SubscribeOptions, owner: SubscriptionOwner) {
    super();
    this.channel = channel;
    this.#owner = owner;
    this.#token = options.token;
    this.#isResume = options.after !== undefined;
    this.#resumeAt(options.after);
    this.#backoff = new Backoff(owner.settings.backoff, owner.settings.random);
    this.#retry = new Timer(owner.settings.clock, () => this.attach());
  }

  get state(): "unsubscribed" | "subscribing" | "subscribed" {
    return this.#state;
  }

  /** The position to resume from, where the channel has history. */
  get cursor(): string | undefined {
    return this.#cursor;
  }

  /** Goes on from the last cursor after `unsubscribe()` or an `unsubscribed`. */
  subscribe(): void {
    if (this.#state !== "unsubscribed") return;
    this.#owner.add(this as Subscription<never>);
    this.#state = "subscribing";
    this.attach();
  }

  /** From here on nothing is delivered. */
  unsubscribe(): void {
    if (this.#state === "unsubscribed") return;
    const isKnown = this.#state === "subscribed" || this.#request !== undefined;
    this.#stop();
    const { leaving, connection } = this.#owner;
    if (!isKnown) return;
    leaving.add(this.channel);
    const command = encode({ type: "unsubscribe", channel: this.channel });
    connection()?.queue(command, () => leaving.delete(this.channel));
  }

  /** @internal Asks for the channel, if it is wanted and was not asked for on this connection. */
  attach(): void {
    const connection = this.#owner.connection();
    if (connection === undefined || this.#state !== "subscribing" || this.#request !== undefined) return;
    if (typeof this.#token === "function") void this.#ask(this.#token, connection);
    else this.#send(connection, this.#token);
  }

  /** What is asked for and given in one go still leaves in one frame. */
  async #ask(getToken: GetToken, connection: Connection): Promise<void> {
    this.#turn += 1;
    const turn = this.#turn;
    // Within `subscribe()` nobody could listen yet to what comes of it.
    await Promise.resolve();
    try {
      const token = await getToken({ isRefused: this.#isRefused });
      if (turn !== this.#turn) return;
      if (token === null) this.#end("unauthorized");
      else this.#send(connection, token);
    } catch (error) {
      if (turn === this.#turn) this.#refused(HubcastError.failed(`no token for ${this.channel}`, error));
    }
  }

  #send(connection: Connection, token: string | undefined): void {
    const command: Command = { type: "subscribe", channel: this.channel };
    if (this.#cursor !== undefined) command.after = this.#cursor;
    if (token !== undefined) command.token = token;
    // No timeout: while the gateway has no Redis it stays pending, and is live as soon as it can be.
    this.#request = connection.queue(encode(command), (answer) => {
      this.#request = undefined;
      if (answer instanceof Error) this.#refused(answer);
      else if (answer.type === "subscribed") this.#subscribed(answer);
    });
  }

  /** @internal The connection is gone. */
  detach(): void {
    this.#turn += 1;
    this.#request = undefined;
    this.#retry.stop();
    if (this.#state === "subscribed") this.#state = "subscribing";
  }

  /** @internal */
  received(frame: ServerFrame): void {
    if (frame.type === "unsubscribed") {
      // One that crossed our own `unsubscribe` is about the time before it.
      if (this.#owner.leaving.has(this.channel)) return;
      if (frame.reason === "token_expired" && this.#mayAskAnew()) this.#askAnew();
      else this.#end(frame.reason ?? "backend");
    } else if (this.#state === "subscribed") {
      if (frame.type === "event") this.#published(frame);
      else if (frame.type === "gap") this.emit("gap", gap(frame));
      else if (frame.type === "join" || frame.type === "leave") this.emit(frame.type, member(frame));
    }
  }

  #subscribed(frame: SubscribedFrame): void {
    const recovered = this.#isResume ? frame.recovered === true : undefined;
    this.#state = "subscribed";
    this.#isResume = true;
    this.#isRefused = false;
    this.#backoff.reset();
    this.#resumeAt(frame.cursor);
    this.emit("subscribed", { recovered, cursor: this.#cursor });
  }

  #published(frame: EventFrame): void {
    if (frame.cursor !== undefined) {
      if (!this.#cursors.pass(frame.cursor)) return;
      this.#cursor = frame.cursor;
    }
    this.emit("publication", new Publication<Data>(frame));
  }

  /** What the gateway or the application says is the position, even if it was passed before. */
  #resumeAt(cursor: string | undefined): void {
    if (cursor === undefined) return;
    this.#cursors.pass(cursor);
    this.#cursor = cursor;
  }

  /** Another token may help, unless the one that was refused is new. */
  #mayAskAnew(): boolean {
    return typeof this.#token === "function" && !this.#isRefused;
  }

  #askAnew(): void {
    this.#isRefused = true;
    this.#state = "subscribing";
    this.attach();
  }

  #refused(error: HubcastError): void {
    if (error.isEnd) return;
    if (REFUSING.includes(error.code) && this.#mayAskAnew()) {
      this.#askAnew();
      return;
    }
    const willPass = PASSING.includes(error.code);
    if (willPass) this.#retry.set(this.#backoff.next(error.retryAfterMs));
    else this.#stop();
    if (!this.emit("error", error)) this.#owner.report(error);
    if (!willPass) this.emit("unsubscribed", { reason: error.code });
  }

  #end(reason: string): void {
    this.#stop();
    this.emit("unsubscribed", { reason });
  }

  #stop(): void {
    this.#turn += 1;
    this.#isRefused = false;
    if (this.#request !== undefined) this.#owner.connection()?.forget(this.#request);
    this.#request = undefined;
    this.#retry.stop();
    this.#state = "unsubscribed";
    this.#owner.remove(this as Subscription<never>);
  }
}
