// The client: keeps one connection, and everything that the application wants of it, over all connections.

import { address } from "./address.js";
import {
  type History,
  type HistoryQuery,
  history,
  type Presence,
  type PresenceQuery,
  type Published,
  presence,
} from "./answers.js";
import { Timer } from "./clock.js";
import { type Close, LOST, NORMAL, UNAUTHORIZED } from "./close.js";
import { Connection } from "./connection.js";
import { Emitter } from "./emitter.js";
import { HubcastError } from "./errors.js";
import { Held } from "./held.js";
import { type Options, type Settings, settings, type Urls } from "./options.js";
import { type Command, encode, type ServerFrame, type WelcomeFrame } from "./protocol.js";
import { Refresh } from "./refresh.js";
import { Return } from "./return.js";
import type { ClientEvents, Status } from "./status.js";
import { type SubscribeOptions, Subscription, type SubscriptionOwner } from "./subscription.js";
import { onWake } from "./wake.js";

export class Client extends Emitter<ClientEvents> {
  readonly #settings: Settings;
  readonly #return: Return;
  readonly #refresh: Refresh;
  readonly #held: Held;
  readonly #subscriptions = new Map<string, Subscription<never>>();
  readonly #owner: SubscriptionOwner;
  /** Fires if the connection is not open in time. */
  readonly #opening: Timer;
  readonly #retry: Timer;
  /** Fires if an instance that drains does not close in time. */
  readonly #overdue: Timer;
  #status: Status = { state: "idle" };
  #connection: Connection | undefined;
  /** Grows with every attempt and every end: what was begun before is of no interest then. */
  #turn = 0;
  #attempts = 0;
  #sleep = () => {};

  constructor(
    private readonly urls: Urls,
    options: Options = {},
  ) {
    super();
    this.#settings = settings(options);
    const { clock } = this.#settings;
    this.#return = new Return(this.#settings);
    this.#refresh = new Refresh(this.#settings, (error) => this.#report(error));
    this.#held = new Held(this.#settings);
    this.#opening = new Timer(clock, () => this.#lost("not open in time"));
    this.#retry = new Timer(clock, () => this.#connect());
    this.#overdue = new Timer(clock, () => this.#lost("draining, but not closed in time"));
    this.#owner = {
      settings: this.#settings,
      leaving: new Set(),
      connection: () => this.#open(),
      add: (subscription) => this.#add(subscription),
      remove: (subscription) => this.#subscriptions.delete(subscription.channel),
      report: (error) => this.#report(error),
    };
  }

  get status(): Status {
    return this.#status;
  }

  /** Connects, and comes back until `close()`. While it waits between attempts: tries now. */
  connect(): void {
    if (this.#isConnected()) return;
    this.#sleep();
    this.#sleep = onWake(() => this.#wake());
    this.#return.reset();
    this.#connect();
  }

  /** Ends the connection. Subscriptions are kept for another `connect()`; what is not answered is rejected. */
  close(code = NORMAL, reason = ""): void {
    if (!this.#isConnected() && !this.#willBeOpen()) return;
    this.#connection?.close(code, reason);
    this.#sleep();
    this.#ended({ code, reason: reason || "closed by the client" }, null);
  }

  /** Subscribes, now or as soon as there is a connection. The same channel gives the same subscription. */
  subscribe<Data = unknown>(channel: string, options: SubscribeOptions = {}): Subscription<Data> {
    const existing = this.#subscriptions.get(channel);
    if (existing) return existing as Subscription<unknown> as Subscription<Data>;
    const subscription = new Subscription<Data>(channel, options, this.#owner);
    subscription.subscribe();
    return subscription;
  }

  /** Resolves when the gateway has it. `HubcastError.outcome` says what a rejection means. */
  async publish(channel: string, data: unknown): Promise<Published> {
    const answer = await this.#request({ type: "publish", channel, data }, "published");
    return answer.cursor === undefined ? {} : { cursor: answer.cursor };
  }

  /** Who is in the channel, over all instances. */
  async presence(channel: string, query: PresenceQuery = {}): Promise<Presence> {
    return presence(await this.#request({ type: "presence", channel, ...query }, "presence"));
  }

  /** What was published in the channel. */
  async history<Data = unknown>(channel: string, query: HistoryQuery = {}): Promise<History<Data>> {
    return history(await this.#request({ type: "history", channel, ...query }, "history"));
  }

  /** Resolves when the gateway has answered. */
  async ping(): Promise<void> {
    await this.#request({ type: "ping" }, "pong");
  }

  // --- requests ---

  #request<Type extends ServerFrame["type"]>(
    command: Command,
    type: Type,
  ): Promise<ServerFrame & { type: Type }> {
    return new Promise((resolve, reject) => {
      const text = encode(command);
      const reply = (answer: ServerFrame | HubcastError) => {
        if (answer instanceof HubcastError) reject(answer);
        else if (answer.type === type) resolve(answer as ServerFrame & { type: Type });
        else reject(new HubcastError("failed", `an answer of type ${answer.type}`, "unknown"));
      };
      const connection = this.#open();
      if (connection) connection.queue(text, reply, this.#settings.requestTimeoutMs);
      else if (this.#willBeOpen()) this.#held.add(text, reply);
      else reject(new HubcastError("closed", "the client is not connected", "not_sent"));
    });
  }

  #add(subscription: Subscription<never>): void {
    const { channel } = subscription;
    if (this.#subscriptions.has(channel)) throw new Error(`another subscription of ${channel} is in use`);
    this.#subscriptions.set(channel, subscription);
  }

  #report(error: HubcastError): void {
    // biome-ignore lint/suspicious/noConsole: nobody listens, and it must not be lost
    if (!this.emit("error", error)) console.error(error);
  }

  // --- the life of a connection ---

  #isConnected(): boolean {
    return ["connecting", "open", "draining"].includes(this.#status.state);
  }

  /** The connection, where commands may be sent. */
  #open(): Connection | undefined {
    return ["open", "draining"].includes(this.#status.state) ? this.#connection : undefined;
  }

  #willBeOpen(): boolean {
    return (
      this.#status.state === "connecting" ||
      (this.#status.state === "closed" && this.#status.retryInMs !== null)
    );
  }

  #connect(): void {
    this.#turn += 1;
    this.#retry.stop();
    this.#opening.set(this.#settings.connectTimeoutMs);
    const turn = this.#turn;
    const attempt = this.#return.attempt();
    this.#become({ state: "connecting", attempt });
    if (turn === this.#turn) void this.#dial(turn, attempt);
  }

  async #dial(turn: number, attempt: number): Promise<void> {
    const { getToken, tokenIn, user } = this.#settings;
    // A handshake with a bad token looks like any other that fails, so the next attempt asks by the command, which is
    // answered.
    const isInQuery = tokenIn === "query" && attempt % 2 === 1;
    try {
      const url = await address(this.urls, this.#attempts++);
      const token = await getToken?.({ isRefused: this.#return.isRefused });
      if (turn !== this.#turn) return;
      if (token === null) {
        this.#ended({ code: UNAUTHORIZED, reason: "there is no token" }, null);
        return;
      }
      if (user !== undefined) url.searchParams.set("user", user);
      if (token !== undefined && isInQuery) url.searchParams.set("token", token);
      this.#connection = new Connection(url, this.#settings, {
        welcomed: (frame) => this.#welcomed(frame, isInQuery ? undefined : token),
        received: (frame) => this.#received(frame),
        puzzled: (error) => this.#report(error),
        ended: (close) => this.#ended(close),
      });
    } catch (error) {
      if (turn !== this.#turn) return;
      this.#report(HubcastError.failed("cannot connect", error));
      if (turn === this.#turn) this.#lost("cannot connect");
    }
  }

  #welcomed(welcome: WelcomeFrame, token: string | undefined): void {
    if (token === undefined) {
      this.#opened(welcome, welcome.expires_in_ms);
      return;
    }
    const auth = encode({ type: "auth", token });
    this.#connection?.queue(auth, (answer) => this.#authenticated(answer, welcome));
  }

  #authenticated(answer: ServerFrame | HubcastError, welcome: WelcomeFrame): void {
    if (!(answer instanceof HubcastError)) {
      this.#opened(welcome, answer.type === "authenticated" ? answer.expires_in_ms : undefined);
    } else if (!answer.isEnd) {
      const isRefused = answer.code === "unauthorized" || answer.code === "forbidden";
      this.#drop({ code: isRefused ? UNAUTHORIZED : LOST, reason: answer.message });
    }
  }

  #opened({ connection_id, instance_id, limits }: WelcomeFrame, expiresInMs: number | undefined): void {
    this.#opening.stop();
    this.#return.opened();
    if (this.#connection) this.#refresh.start(this.#connection, expiresInMs);
    this.#become({
      state: "open",
      connectionId: connection_id,
      instanceId: instance_id,
      limits: {
        messageBytes: limits.message_bytes,
        publishBytes: limits.publish_bytes,
        subscriptions: limits.subscriptions,
      },
    });
  }

  #received(frame: ServerFrame): void {
    if (frame.type === "draining") {
      this.#overdue.set(this.#return.draining(frame.retry_after_ms));
      // Before it is open there is nothing that could go on.
      if (this.#status.state !== "open") return;
      this.#become({ state: "draining", retryAfterMs: frame.retry_after_ms });
    } else if ("channel" in frame && frame.type !== "error") {
      this.#subscriptions.get(frame.channel ?? "")?.received(frame);
    } else if (frame.type === "error") {
      this.#report(HubcastError.of(frame));
    }
  }

  #lost(reason: string): void {
    this.#drop({ code: LOST, reason });
  }

  /** Ends it from our side, as if it had ended. */
  #drop(close: Close): void {
    if (this.#connection) this.#connection.fail(close);
    else this.#ended(close);
  }

  #ended(close: Close, retryInMs = this.#return.delay(close)): void {
    this.#turn += 1;
    this.#connection = undefined;
    this.#refresh.stop();
    for (const timer of [this.#opening, this.#overdue, this.#retry]) timer.stop();
    for (const subscription of this.#subscriptions.values()) subscription.detach();
    if (retryInMs === null) this.#held.refuse();
    else this.#retry.set(retryInMs);
    this.#become({ state: "closed", ...close, retryInMs });
  }

  #become(status: Status): void {
    this.#status = status;
    if (status.state === "open" && this.#connection) {
      for (const subscription of this.#subscriptions.values()) subscription.attach();
      this.#held.release(this.#connection);
    }
    this.emit("status", status);
  }

  /** The page or the network is back: what was lost to it need not wait, what looks alive is asked. */
  #wake(): void {
    const status = this.#status;
    if (this.#isConnected()) this.#connection?.probe();
    else if (status.state === "closed" && status.code === LOST && status.retryInMs !== null) this.#connect();
  }
}
