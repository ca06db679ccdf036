// Requests, their answers, and what becomes of those that have none.

import assert from "node:assert/strict";
import { test } from "node:test";
import { HubcastError } from "../../src/index.js";
import { settled, World } from "./fake.js";

/** How a request ends, if it has. */
function outcome(request: Promise<unknown>): { is: unknown } {
  const seen: { is: unknown } = { is: "pending" };
  request.then(
    (value) => (seen.is = value),
    (error) => (seen.is = error instanceof HubcastError ? [error.code, error.outcome] : error),
  );
  return seen;
}

test("a publish is acknowledged, with and without a cursor, in any order", async () => {
  const world = await World.open();
  const first = world.client.publish("chat", { text: "hi" });
  const second = world.client.publish("chat", null);
  const [a, b] = await world.socket.heard();
  assert.deepEqual(a, { id: a?.id, type: "publish", channel: "chat", data: { text: "hi" } });
  assert.equal(world.socket.frames, 1, "what is said in one go leaves in one frame");
  world.socket.say({ type: "published", id: b?.id, cursor: "9" });
  assert.deepEqual(await second, { cursor: "9" });
  world.socket.say({ type: "published", id: a?.id });
  assert.deepEqual(await first, {});
});

test("a refusal carries its code and when to try again", async () => {
  const world = await World.open();
  const publish = world.client.publish("chat", 1);
  const { id } = await world.socket.heardOne("publish");
  const retry_after_ms = 1_000;
  world.socket.say({
    type: "error",
    id,
    code: "unavailable",
    message: "away",
    channel: "chat",
    retry_after_ms,
    outcome: "unknown",
  });
  await assert.rejects(publish, (error) => {
    assert.ok(error instanceof HubcastError);
    const { code, message, channel, retryAfterMs } = error;
    assert.deepEqual(
      { code, message, channel, retryAfterMs },
      { code: "unavailable", message: "away", channel: "chat", retryAfterMs: 1_000 },
    );
    assert.equal(error.outcome, "unknown");
    return true;
  });
});

test("the outcome tells what is known", async () => {
  const world = await World.open();
  const refused = outcome(world.client.publish("chat", 1));
  const [command] = await world.socket.heard();
  world.socket.say({ type: "error", id: command?.id, code: "forbidden", message: "no" });
  const late = outcome(world.client.publish("chat", 2));
  await settled();
  await world.clock.advance(10_000);
  const lost = outcome(world.client.publish("chat", 3));
  await settled();
  world.socket.end(1012);
  const never = outcome(world.client.publish("chat", 4));
  world.client.close();
  const closed = outcome(world.client.publish("chat", 5));
  await settled();
  assert.deepEqual(
    [refused, late, lost, never, closed].map(({ is }) => is),
    [
      ["forbidden", "refused"],
      ["timeout", "unknown"],
      ["disconnected", "unknown"],
      ["closed", "not_sent"],
      ["closed", "not_sent"],
    ],
  );
  assert.equal(world.clock.timers, 0);
});

test("requests wait for a connection, in their order, behind the subscriptions, for a bounded time", async () => {
  const world = new World();
  const idle = outcome(world.client.publish("chat", 0));
  world.client.connect();
  const all = [1, 2].map((n) => world.client.publish("chat", n));
  world.client.subscribe("chat");
  world.client.on("status", ({ state }) => state === "open" && all.push(world.client.publish("chat", 3)));
  await world.accept();
  const heard = await world.socket.heard();
  assert.deepEqual(
    heard.map(({ type, data }) => [type, data]),
    [
      ["subscribe", undefined],
      ["publish", 1],
      ["publish", 2],
      ["publish", 3],
    ],
  );
  for (const { id } of heard.slice(1)) world.socket.say({ type: "published", id });
  await Promise.all(all);
  assert.deepEqual(idle.is, ["closed", "not_sent"]);
  world.socket.end(1006);
  world.random = 0;
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  const late = outcome(world.client.publish("chat", 4));
  await world.clock.advance(10_000);
  assert.deepEqual(late.is, ["timeout", "not_sent"]);
});

test("waiting requests are bounded", async () => {
  const world = new World();
  world.client.connect();
  const waiting = Array.from({ length: 1_000 }, () => outcome(world.client.ping()));
  const more = outcome(world.client.ping());
  await settled();
  assert.deepEqual([waiting[999]?.is, more.is], ["pending", ["limit_exceeded", "not_sent"]]);
});

test("a message above the gateway's limit is refused here, in bytes and not in letters", async () => {
  const world = new World();
  world.client.connect();
  await settled();
  world.socket.welcome({ message_bytes: 200 });
  const big = outcome(world.client.publish("chat", "ä".repeat(100)));
  const fits = outcome(world.client.publish("chat", "a".repeat(100)));
  await world.socket.heardOne("publish");
  assert.deepEqual([big.is, fits.is], [["too_large", "refused"], "pending"]);
});

test("close() sends what was said before, and leaves the rest unknown", async () => {
  const world = await World.open();
  const publish = outcome(world.client.publish("chat", 1));
  world.client.close(4000, "bye");
  await world.socket.heardOne("publish");
  assert.deepEqual(world.socket.closedWith, { code: 4000, reason: "bye" });
  assert.deepEqual(publish.is, ["closed", "unknown"]);
});

test("presence", async () => {
  const world = await World.open();
  const presence = world.client.presence("chat", { limit: 2, page: "p" });
  const { id, ...sent } = await world.socket.heardOne("presence");
  assert.deepEqual(sent, { type: "presence", channel: "chat", limit: 2, page: "p" });
  const members = [{ user: "alice", connection_id: "c1" }, { connection_id: "c2" }];
  world.socket.say({ type: "presence", id, channel: "chat", users: 1, connections: 2, members, page: null });
  assert.deepEqual(await presence, {
    users: 1,
    connections: 2,
    members: [{ user: "alice", connectionId: "c1" }, { connectionId: "c2" }],
    page: null,
  });
});

test("history, with a gap in it", async () => {
  const world = await World.open();
  const history = world.client.history<number>("chat", { after: "1", limit: 3 });
  const { id, ...sent } = await world.socket.heardOne("history");
  assert.deepEqual(sent, { type: "history", channel: "chat", after: "1", limit: 3 });
  const events = [
    { type: "event", channel: "chat", cursor: "2", data: 2 },
    { type: "gap", channel: "chat", after: "2", next: "5", reason: "upstream" },
    { type: "event", channel: "chat", cursor: "5", data: 5 },
  ];
  world.socket.say({ type: "history", id, channel: "chat", events, has_more: true, cursor: "7" });
  const { publications, gaps, hasMore, cursor } = await history;
  assert.deepEqual(
    publications.map(({ cursor, data }) => [cursor, data]),
    [
      ["2", 2],
      ["5", 5],
    ],
  );
  assert.deepEqual(gaps, [{ after: "2", next: "5", reason: "upstream" }]);
  assert.deepEqual([hasMore, cursor], [true, "7"]);
});
