// What a client and the gateway tell each other on one connection.

import assert from "node:assert/strict";
import { test } from "node:test";
import { HubcastError } from "../../src/index.js";
import { becomes, client, Gateway, live, told, WEBSOCKETS } from "./gateway.js";

for (const [name, WebSocket] of WEBSOCKETS) {
  test(`publications over HTTP reach a subscriber in their order (${name})`, async (t) => {
    const gateway = await Gateway.start(t);
    const hubcast = client(t, gateway.url, { WebSocket });
    const { subscription, data } = await live(hubcast, "news");
    const published = ['{"a":[1,2]}', "no JSON", Uint8Array.of(255, 0, 128), "0"];
    const last = new Promise((resolve) => {
      subscription.on("publication", (publication) => publication.data === 0 && resolve(publication));
    });
    for (const body of published) await gateway.publish("news", body);
    await last;
    assert.deepEqual(data, [{ a: [1, 2] }, "no JSON", Uint8Array.of(255, 0, 128), 0]);
  });

  test(`the backend ends a connection (${name})`, async (t) => {
    const gateway = await Gateway.start(t);
    const hubcast = client(t, gateway.url, { WebSocket, user: "alice" });
    await live(hubcast, "news");
    let closed = becomes(hubcast, "closed");
    assert.deepEqual(await gateway.post("disconnect", { user: "alice", code: 1008 }), { disconnected: 1 });
    const { code, reason, retryInMs } = await closed;
    assert.deepEqual([code, reason], [1008, "disconnected by the backend"]);
    assert.ok(retryInMs !== null && retryInMs >= 20, "it backs off");
    await becomes(hubcast, "open");
    closed = becomes(hubcast, "closed");
    await gateway.post("disconnect", { user: "alice", code: 4007, reason: "banned" });
    assert.deepEqual(await closed, { state: "closed", code: 4007, reason: "banned", retryInMs: null });
    const open = becomes(hubcast, "open");
    hubcast.connect();
    await open;
    closed = becomes(hubcast, "closed");
    await gateway.post("disconnect", { user: "alice" });
    const byDefault = { state: "closed", code: 3003, reason: "disconnected by the backend", retryInMs: null };
    assert.deepEqual(await closed, byDefault);
  });
}

test("the application may come back after a code that it chose", async (t) => {
  const gateway = await Gateway.start(t);
  const shouldReconnect = ({ code }: { code: number }, byDefault: boolean) => byDefault || code === 4007;
  const hubcast = client(t, gateway.url, { user: "alice", shouldReconnect });
  const { subscription } = await live(hubcast, "news");
  const again = told(subscription, "subscribed");
  await gateway.post("disconnect", { user: "alice", code: 4007 });
  assert.deepEqual(await again, { recovered: false, cursor: undefined });
});

test("clients publish, with an acknowledgement, where the rule allows it", async (t) => {
  const rules = [{ match: "chat:*", client_publish: true }, { match: "news" }];
  const gateway = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: JSON.stringify(rules) });
  const alice = client(t, gateway.url);
  const bob = client(t, gateway.url);
  const { subscription, data } = await live(bob, "chat:1");
  const last = new Promise((resolve) =>
    subscription.on("publication", ({ data }) => data === 99 && resolve(data)),
  );
  const acknowledged = Array.from({ length: 100 }, (_, n) => alice.publish("chat:1", n));
  for (const answer of await Promise.all(acknowledged)) assert.deepEqual(answer, {});
  await last;
  assert.deepEqual(
    data,
    Array.from({ length: 100 }, (_, n) => n),
    "in order, none missing",
  );
  await assert.rejects(alice.publish("news", 1), (error) => {
    assert.ok(error instanceof HubcastError);
    assert.deepEqual([error.code, error.outcome, error.channel], ["forbidden", "refused", "news"]);
    return true;
  });
  await assert.rejects(alice.publish("chat:1", "x".repeat(100_000)), {
    code: "too_large",
    outcome: "refused",
  });
  await assert.rejects(alice.publish("not a channel", 1), { code: "bad_request" });
  await alice.ping();
});

test("presence: who is there, page by page, who comes and who goes", async (t) => {
  const rules = [{ match: "chat:*", presence: true }];
  const gateway = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: JSON.stringify(rules) });
  const alice = client(t, gateway.url, { user: "alice" });
  const bob = client(t, gateway.url, { user: "bob" });
  const { subscription } = await live(alice, "chat:1");
  const joined = new Promise((resolve) =>
    subscription.on("join", ({ user }) => user === "bob" && resolve(user)),
  );
  await live(bob, "chat:1");
  await joined;
  const first = await alice.presence("chat:1", { limit: 1 });
  assert.deepEqual([first.users, first.connections, first.members.length], [2, 2, 1]);
  assert.ok(first.page);
  const second = await alice.presence("chat:1", { limit: 1, page: first.page });
  assert.deepEqual([...first.members, ...second.members].map(({ user }) => user).sort(), ["alice", "bob"]);
  assert.deepEqual((await alice.presence("chat:1", { limit: 0 })).members, []);
  const left = told(subscription, "leave");
  bob.close();
  assert.deepEqual(await left, { user: "bob" });
  await assert.rejects(alice.presence("news"), { code: "forbidden" });
});

test("the backend ends a subscription, and only that one", async (t) => {
  const gateway = await Gateway.start(t);
  const hubcast = client(t, gateway.url, { user: "alice" });
  const { subscription: news, data } = await live(hubcast, "news");
  const { subscription: other } = await live(hubcast, "other");
  const ended = told(news, "unsubscribed");
  assert.deepEqual(await gateway.post("unsubscribe", { user: "alice", channel: "news" }), {
    unsubscribed: 1,
  });
  assert.deepEqual(await ended, { reason: "backend" });
  const arrived = told(other, "publication");
  await gateway.publish("news", "1");
  await gateway.publish("other", "2");
  await arrived;
  assert.deepEqual(data, []);
  news.subscribe();
  await told(news, "subscribed");
  const again = told(news, "publication");
  await gateway.publish("news", "3");
  assert.equal((await again).data, 3);
});

test("subscriptions beyond the limit are refused, each by itself", async (t) => {
  const gateway = await Gateway.start(t, { HUBCAST_SUBSCRIPTIONS_MAX: "2" });
  const hubcast = client(t, gateway.url);
  const subscriptions = ["a", "b", "c"].map((channel) => hubcast.subscribe(channel));
  const [a, b, c] = subscriptions as [
    (typeof subscriptions)[0],
    (typeof subscriptions)[0],
    (typeof subscriptions)[0],
  ];
  c.on("error", () => {});
  const refused = told(c, "unsubscribed");
  await Promise.all([told(a, "subscribed"), told(b, "subscribed")]);
  assert.deepEqual(await refused, { reason: "limit_exceeded" });
});
