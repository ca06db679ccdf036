// The real gateway as a process of its own, on free ports; and clients of it.

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import type { TestContext } from "node:test";
import { WebSocket } from "ws";
import {
  Client,
  type ClientEvents,
  type Options,
  type Status,
  type Subscription,
  type SubscriptionEvents,
  type Urls,
  type WebSocketConstructor,
} from "../../src/index.js";

/** The WebSocket of npm `ws`, and where there is one that of the platform. */
export const WEBSOCKETS: [string, WebSocketConstructor][] = [["ws", WebSocket]];
if (globalThis.WebSocket) WEBSOCKETS.push(["built in", globalThis.WebSocket]);

/** Nothing here takes that long, even on a busy machine. */
const PATIENCE_MS = 30_000;

export class Gateway {
  private constructor(
    private readonly process: ChildProcess,
    readonly url: string,
    private readonly internal: string,
  ) {}

  /** Starts one; it ends with the test at the latest. */
  static async start(test: TestContext, env: Record<string, string> = {}): Promise<Gateway> {
    const binary = process.env.HUBCAST_BIN;
    assert.ok(binary, "HUBCAST_BIN is the path of the gateway");
    const gateway = spawn(binary, {
      env: {
        HUBCAST_LISTEN: "127.0.0.1:0",
        HUBCAST_INTERNAL_LISTEN: "127.0.0.1:0",
        HUBCAST_LOG: "warn",
        ...env,
      },
      stdio: ["ignore", "pipe", "inherit"],
    });
    test.after(() => gateway.kill("SIGKILL"));
    let url: string | undefined;
    for await (const line of createInterface(gateway.stdout)) {
      url ??= /ws:\/\/[^?]*/.exec(line)?.[0];
      const internal = /http:\/\/[^/]*/.exec(line)?.[0];
      if (url && internal) return new Gateway(gateway, url, internal);
    }
    throw new Error("it ended before it was ready");
  }

  signal(signal: "SIGTERM" | "SIGKILL"): void {
    this.process.kill(signal);
  }

  /** Waits for its end; gives the exit code. */
  async end(): Promise<number | null> {
    if (this.process.exitCode === null && this.process.signalCode === null) await once(this.process, "exit");
    return this.process.exitCode;
  }

  /** Publishes a body as it is. */
  async publish(channel: string, body: string | Uint8Array): Promise<void> {
    await this.post(`publish/${encodeURIComponent(channel)}`, body);
  }

  async post(path: string, body: string | Uint8Array | object): Promise<unknown> {
    const isRaw = typeof body === "string" || body instanceof Uint8Array;
    const response = await fetch(`${this.internal}/api/${path}`, {
      method: "POST",
      body: isRaw ? (body as string) : JSON.stringify(body),
    });
    const answer = await response.text();
    assert.equal(response.status, 200, answer);
    return JSON.parse(answer);
  }

  /** Waits until a metric is above zero. */
  async counted(metric: string): Promise<void> {
    const start = Date.now();
    for (;;) {
      const metrics = await (await fetch(`${this.internal}/metrics`)).text();
      const line = metrics.split("\n").find((candidate) => candidate.startsWith(`${metric} `));
      if (Number(line?.slice(metric.length)) > 0) return;
      assert.ok(Date.now() - start < PATIENCE_MS, `${metric} stays zero`);
    }
  }
}

/** A client that ends with the test. */
export function client(test: TestContext, urls: Urls, options: Options = {}): Client {
  const hubcast = new Client(urls, {
    WebSocket,
    backoff: { baseMs: 20, maxMs: 200 },
    ...options,
  });
  test.after(() => hubcast.close());
  hubcast.connect();
  return hubcast;
}

/** The next event of this type that is as wanted. */
function next<Event>(
  what: string,
  on: (listener: (event: Event) => void) => () => void,
  isWanted: (event: Event) => boolean,
): Promise<Event> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${what} in ${PATIENCE_MS} ms`)), PATIENCE_MS);
    const off = on((event) => {
      if (!isWanted(event)) return;
      off();
      clearTimeout(timer);
      resolve(event);
    });
  });
}

/** The next event of a subscription. */
export function told<Type extends keyof SubscriptionEvents<unknown>>(
  subscription: Subscription,
  type: Type,
): Promise<SubscriptionEvents<unknown>[Type]> {
  return next(
    type,
    (listener) => subscription.on(type, listener),
    () => true,
  );
}

/** The next status of this kind. */
export function becomes<State extends Status["state"]>(
  hubcast: Client,
  state: State,
): Promise<Extract<Status, { state: State }>> {
  const status = next<ClientEvents["status"]>(
    state,
    (listener) => hubcast.on("status", listener),
    (candidate) => candidate.state === state,
  );
  return status as Promise<Extract<Status, { state: State }>>;
}

/** Subscribes and waits until the channel is live; `data` collects what is published. */
export async function live(
  hubcast: Client,
  channel: string,
): Promise<{ subscription: Subscription; data: unknown[] }> {
  const subscription = hubcast.subscribe(channel);
  const data: unknown[] = [];
  subscription.on("publication", (publication) => data.push(publication.bytes ?? publication.data));
  await told(subscription, "subscribed");
  return { subscription, data };
}
