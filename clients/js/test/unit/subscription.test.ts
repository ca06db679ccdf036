// What a subscription is told, over all connections.

import assert from "node:assert/strict";
import { test } from "node:test";
import type { Subscription, SubscriptionEvents } from "../../src/index.js";
import { World } from "./fake.js";

/** Everything a subscription says, in one list. */
function told(subscription: Subscription): unknown[][] {
  const all: unknown[][] = [];
  const types: (keyof SubscriptionEvents<unknown>)[] = ["subscribed", "gap", "join", "leave", "unsubscribed"];
  for (const type of types) subscription.on(type, (event) => all.push([type, event]));
  subscription.on("publication", ({ data, cursor }) =>
    all.push(["publication", data, ...(cursor ? [cursor] : [])]),
  );
  subscription.on("error", (error) => all.push(["error", error.code]));
  return all;
}

/** Answers the subscribe that was sent last. */
async function live(world: World, members: object = {}): Promise<object> {
  const { id, type: _, ...sent } = await world.socket.heardOne("subscribe");
  world.socket.say({ type: "subscribed", id, channel: sent.channel, ...members });
  return sent;
}

test("without history: publications, joins, leaves, gaps", async () => {
  const world = new World();
  const news = world.client.subscribe("news");
  const all = told(news);
  world.client.connect();
  await world.accept();
  assert.deepEqual(await live(world), { channel: "news" });
  world.socket.say({ type: "event", channel: "news", data: { a: 1 } });
  world.socket.say({ type: "event", channel: "other", data: 2 });
  world.socket.say({ type: "join", channel: "news", user: "alice" });
  world.socket.say({ type: "leave", channel: "news", connection_id: "c9" });
  world.socket.say({ type: "gap", channel: "news", reason: "upstream" });
  assert.deepEqual(all, [
    ["subscribed", { recovered: undefined, cursor: undefined }],
    ["publication", { a: 1 }],
    ["join", { user: "alice" }],
    ["leave", { connectionId: "c9" }],
    ["gap", { reason: "upstream" }],
  ]);
});

test("without history a reconnect says that something may be missing", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world);
  const all = told(news);
  world.socket.end(1006);
  assert.equal(news.state, "subscribing");
  await world.comeBack();
  assert.deepEqual(await live(world), { channel: "news" });
  assert.deepEqual(all, [["subscribed", { recovered: false, cursor: undefined }]]);
});

test("with history: resumed behind the last cursor, nothing twice", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  const all = told(news);
  await live(world, { cursor: "5", recovered: false });
  world.socket.say({ type: "event", channel: "news", cursor: "6", data: 6 });
  world.socket.say({ type: "event", channel: "news", cursor: "7", data: 7 });
  assert.equal(news.cursor, "7");
  world.socket.end(4101);
  await world.comeBack();
  assert.deepEqual(await live(world, { cursor: "7", recovered: true }), { channel: "news", after: "7" });
  for (const n of [6, 7, 8, 9, 8])
    world.socket.say({ type: "event", channel: "news", cursor: `${n}`, data: n });
  assert.deepEqual(all, [
    ["subscribed", { recovered: undefined, cursor: "5" }],
    ["publication", 6, "6"],
    ["publication", 7, "7"],
    ["subscribed", { recovered: true, cursor: "7" }],
    ["publication", 8, "8"],
    ["publication", 9, "9"],
  ]);
  assert.equal(news.cursor, "9");
});

test("not recovered: the gateway's position counts, even one that was passed before", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news", { after: "4" });
  const all = told(news);
  assert.deepEqual(await live(world, { cursor: "4", recovered: true }), { channel: "news", after: "4" });
  world.socket.say({ type: "event", channel: "news", cursor: "5", data: 5 });
  world.socket.say({ type: "gap", channel: "news", after: "5", next: "8", reason: "slow" });
  world.socket.end(1006);
  await world.comeBack();
  assert.deepEqual(await live(world, { cursor: "4", recovered: false }), { channel: "news", after: "5" });
  assert.equal(news.cursor, "4");
  assert.deepEqual(all, [
    ["subscribed", { recovered: true, cursor: "4" }],
    ["publication", 5, "5"],
    ["gap", { after: "5", next: "8", reason: "slow" }],
    ["subscribed", { recovered: false, cursor: "4" }],
  ]);
});

test("everything is subscribed again in one frame, each by itself", async () => {
  const world = await World.open();
  for (const channel of ["a", "b", "c"]) world.client.subscribe(channel, { token: `t-${channel}` });
  const first = await world.socket.heard();
  assert.equal(world.socket.frames, 1);
  world.socket.say({ type: "subscribed", id: first[1]?.id, channel: "b", cursor: "7" });
  world.socket.end(1006);
  await world.comeBack();
  const again = await world.socket.heard();
  assert.equal(world.socket.frames, 1);
  assert.deepEqual(
    again.map(({ id: _, ...sent }) => sent),
    [
      { type: "subscribe", channel: "a", token: "t-a" },
      { type: "subscribe", channel: "b", after: "7", token: "t-b" },
      { type: "subscribe", channel: "c", token: "t-c" },
    ],
  );
});

test("many subscriptions are cut into frames that the gateway takes", async () => {
  const world = new World();
  for (let n = 0; n < 200; n += 1) world.client.subscribe(`${"x".repeat(200)}${n}`);
  world.client.connect();
  await world.accept();
  assert.equal((await world.socket.heard()).length, 200);
  assert.equal(world.socket.frames, 1, "under 64 KiB");
  world.socket.end(1006);
  await world.clock.advance(500);
  world.socket.welcome({ message_bytes: 4_096 });
  assert.equal((await world.socket.heard()).length, 200);
  assert.ok(world.socket.frames > 12);
});

test("answers out of order go to their own subscription", async () => {
  const world = await World.open();
  const subscriptions = ["a", "b"].map((channel) => world.client.subscribe(channel));
  const [a, b] = await world.socket.heard();
  world.socket.say({ type: "subscribed", id: b?.id, channel: "b" });
  assert.deepEqual(
    subscriptions.map(({ state }) => state),
    ["subscribing", "subscribed"],
  );
  world.socket.say({ type: "subscribed", id: a?.id, channel: "a" });
  assert.deepEqual(
    subscriptions.map(({ state }) => state),
    ["subscribed", "subscribed"],
  );
});

test("unsubscribed: nothing more arrives, and it is not subscribed again", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world);
  const all = told(news);
  news.unsubscribe();
  const { id } = await world.socket.heardOne("unsubscribe");
  world.socket.say({ type: "event", channel: "news", data: 1 });
  world.socket.say({ type: "unsubscribed", id, channel: "news" });
  news.unsubscribe();
  world.socket.end(1006);
  await world.comeBack();
  assert.deepEqual(await world.socket.heard(), []);
  assert.deepEqual(all, []);
  assert.equal(news.state, "unsubscribed");
});

test("unsubscribe and subscribe again: what crosses it is not taken for the new one", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world, { cursor: "1" });
  const all = told(news);
  news.unsubscribe();
  news.subscribe();
  const [unsubscribe, subscribe] = await world.socket.heard();
  assert.equal(subscribe?.after, "1");
  world.socket.say({ type: "event", channel: "news", cursor: "2", data: "old" });
  world.socket.say({ type: "unsubscribed", channel: "news", reason: "backend" });
  world.socket.say({ type: "unsubscribed", id: unsubscribe?.id, channel: "news" });
  assert.equal(news.state, "subscribing");
  world.socket.say({ type: "subscribed", id: subscribe?.id, channel: "news", cursor: "1", recovered: true });
  world.socket.say({ type: "event", channel: "news", cursor: "2", data: "new" });
  assert.deepEqual(all, [
    ["subscribed", { recovered: true, cursor: "1" }],
    ["publication", "new", "2"],
  ]);
});

test("a pending subscribe that is given up is not answered to anybody", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  const { id } = await world.socket.heardOne("subscribe");
  await world.clock.advance(3_600_000);
  assert.equal(news.state, "subscribing", "it may stay pending for long");
  news.unsubscribe();
  world.socket.say({ type: "subscribed", id, channel: "news" });
  assert.equal(news.state, "unsubscribed");
});

test("the backend ends a subscription: told, final, and one call takes it up again", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world);
  const all = told(news);
  world.socket.say({ type: "unsubscribed", channel: "news", reason: "backend" });
  world.socket.end(1006);
  await world.comeBack();
  assert.deepEqual(await world.socket.heard(), []);
  news.subscribe();
  await live(world);
  assert.deepEqual(all, [
    ["unsubscribed", { reason: "backend" }],
    ["subscribed", { recovered: false, cursor: undefined }],
  ]);
});

test("a refused subscription ends, one that has to wait is tried again", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  const all = told(news);
  const refuse = async (code: string, members: object = {}) => {
    const { id } = await world.socket.heardOne("subscribe");
    world.socket.say({ type: "error", id, code, message: code, channel: "news", ...members });
  };
  await refuse("unavailable", { retry_after_ms: 1_000 });
  await world.clock.advance(1_499);
  assert.deepEqual(await world.socket.heard(), []);
  await world.clock.advance(1);
  await refuse("rate_limited");
  await world.clock.advance(1_000);
  await refuse("forbidden");
  assert.deepEqual(all, [
    ["error", "unavailable"],
    ["error", "rate_limited"],
    ["error", "forbidden"],
    ["unsubscribed", { reason: "forbidden" }],
  ]);
  assert.equal(world.clock.timers, 0);
  assert.deepEqual(world.errors, []);
});

test("a subscription that waits to be tried again leaves nothing behind", async () => {
  const world = await World.open();
  world.client.subscribe("news").on("error", () => {});
  const { id } = await world.socket.heardOne("subscribe");
  world.socket.say({ type: "error", id, code: "unavailable", message: "later", channel: "news" });
  assert.equal(world.clock.timers, 1);
  world.client.close();
  assert.equal(world.clock.timers, 0);
});

test("an error that nobody listens to goes to the client", async () => {
  const world = await World.open();
  world.client.subscribe("news");
  const { id } = await world.socket.heardOne("subscribe");
  world.socket.say({ type: "error", id, code: "forbidden", message: "no", channel: "news" });
  assert.deepEqual(
    world.errors.map(({ code, channel }) => [code, channel]),
    [["forbidden", "news"]],
  );
});

test("one subscription a channel", async () => {
  const world = await World.open();
  const first = world.client.subscribe("news");
  assert.equal(world.client.subscribe("news"), first);
  assert.equal((await world.socket.heard()).length, 1);
  first.unsubscribe();
  const second = world.client.subscribe("news");
  assert.notEqual(second, first);
  assert.throws(() => first.subscribe(), /in use/);
});

test("bytes are decoded when they are asked for", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world);
  const got: (Uint8Array | undefined)[] = [];
  news.on("publication", (publication) => got.push(publication.bytes));
  world.socket.say({ type: "event", channel: "news", data_base64: "AP+A" });
  world.socket.say({ type: "event", channel: "news", data: "text" });
  assert.deepEqual(got, [Uint8Array.of(0, 255, 128), undefined]);
});

test("a listener that is taken off hears no more", async () => {
  const world = await World.open();
  const news = world.client.subscribe("news");
  await live(world);
  const got: unknown[] = [];
  const off = news.on("publication", ({ data }) => {
    got.push(data);
    off();
  });
  world.socket.say({ type: "event", channel: "news", data: 1 });
  world.socket.say({ type: "event", channel: "news", data: 2 });
  assert.deepEqual(got, [1]);
});
