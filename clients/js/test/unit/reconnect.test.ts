// When a client comes back, and when it does not.

import assert from "node:assert/strict";
import { test } from "node:test";
import { comesBack, HubcastError } from "../../src/index.js";
import { settled, World } from "./fake.js";

test("the table of close codes", () => {
  for (const code of [1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1011, 1012, 1013, 1014, 3008, 4101]) {
    assert.equal(comesBack(code), true, `${code}`);
  }
  for (const code of [1000, 3000, 3001, 3003, 3999, 4000, 4001, 4100, 4102, 4999]) {
    assert.equal(comesBack(code), false, `${code}`);
  }
});

test("statuses tell the whole story", async () => {
  const world = await World.open();
  world.socket.end(1006);
  await world.comeBack();
  world.client.close();
  assert.deepEqual(
    world.statuses.map((status) => status.state),
    ["connecting", "open", "closed", "connecting", "open", "closed"],
  );
  assert.deepEqual(world.statuses[1], {
    state: "open",
    connectionId: "c1",
    instanceId: "i1",
    limits: { messageBytes: 65_536, publishBytes: 1_048_576, subscriptions: 128 },
  });
  assert.deepEqual(world.statuses[2], { state: "closed", code: 1006, reason: "", retryInMs: 500 });
  assert.deepEqual(world.statuses[5], {
    state: "closed",
    code: 1000,
    reason: "closed by the client",
    retryInMs: null,
  });
  assert.deepEqual(world.socket.closedWith, { code: 1000, reason: "" });
  assert.equal(world.clock.timers, 0, "nothing is left behind");
});

test("the delay is fully random, doubles and stays below its bound", async () => {
  for (const random of [0, 0.25, 0.999]) {
    const world = new World({ backoff: { baseMs: 100, maxMs: 1_000 } });
    world.random = random;
    world.client.connect();
    for (const ceiling of [100, 200, 400, 800, 1_000, 1_000]) {
      await settled();
      world.socket.end(1006);
      assert.equal(world.retryInMs, random * ceiling);
      await world.clock.advance(random * ceiling);
    }
    assert.equal(world.sockets.length, 7);
  }
});

test("only a connection that lasted resets the delay", async () => {
  const world = new World({ backoff: { baseMs: 100, maxMs: 10_000 } });
  world.client.connect();
  for (const delay of [50, 100, 200]) {
    await world.accept();
    world.socket.end(1011);
    assert.equal(world.retryInMs, delay, "accepted and dropped again");
    await world.clock.advance(delay);
  }
  await world.accept();
  await world.clock.advance(10_000);
  world.socket.end(1011);
  assert.equal(world.retryInMs, 50);
});

test("who is too slow or does too much backs off, more each time, however long it was connected", async () => {
  for (const code of [1008, 1013, 4101]) {
    const world = await World.open({ backoff: { baseMs: 100, maxMs: 10_000 } });
    for (const delay of [100 + 50, 100 + 100, 100 + 200]) {
      await world.clock.advance(60_000);
      world.socket.end(code, "too much");
      assert.equal(world.retryInMs, delay);
      await world.comeBack();
    }
  }
});

test("what somebody decided is final, and connect() begins anew", async () => {
  for (const code of [1000, 3000, 3003, 4000, 4999]) {
    const world = await World.open();
    world.socket.end(code, "go away");
    assert.deepEqual(world.client.status, { state: "closed", code, reason: "go away", retryInMs: null });
    assert.equal(world.clock.timers, 0);
    world.client.connect();
    await world.accept();
    assert.equal(world.client.status.state, "open");
  }
});

test("the application may decide otherwise", async () => {
  const asked: [number, boolean][] = [];
  const world = await World.open({
    shouldReconnect: ({ code }, byDefault) => {
      asked.push([code, byDefault]);
      return code === 4001;
    },
  });
  world.socket.end(4001);
  assert.equal(world.retryInMs, 500);
  await world.comeBack();
  world.socket.end(1012);
  assert.equal(world.retryInMs, null);
  assert.deepEqual(asked, [
    [4001, false],
    [1012, true],
  ]);
});

test("a drain: back at the moment that was drawn, within the time", async () => {
  const world = await World.open();
  world.random = 0.75;
  world.socket.say({ type: "draining", retry_after_ms: 20_000 });
  assert.deepEqual(world.client.status, { state: "draining", retryAfterMs: 20_000 });
  await world.clock.advance(5_000);
  world.socket.end(1012);
  assert.equal(world.retryInMs, 10_000, "15 s after the announcement");
  await world.comeBack();
  assert.equal(world.client.status.state, "open");
});

test("a drain whose close comes after the drawn moment: soon, and still within the time", async () => {
  const world = await World.open();
  world.random = 0.1;
  world.socket.say({ type: "draining", retry_after_ms: 20_000 });
  await world.clock.advance(19_600);
  world.random = 0.999;
  world.socket.end(1012);
  assert.equal(world.retryInMs, 0.999 * 400);
});

test("a drain that nobody ends is left", async () => {
  const world = await World.open();
  world.socket.say({ type: "draining", retry_after_ms: 1_000 });
  await world.clock.advance(5_999);
  assert.equal(world.client.status.state, "draining");
  await world.clock.advance(1);
  assert.equal(world.retryInMs, 500);
});

test("a drain is forgotten by close()", async () => {
  const world = await World.open();
  world.socket.say({ type: "draining", retry_after_ms: 60_000 });
  world.client.close();
  world.client.connect();
  await settled();
  world.socket.end(1006);
  assert.equal(world.retryInMs, 500);
});

test("a drain that begins before the token is accepted", async () => {
  const world = new World({ getToken: () => "t", tokenIn: "command" });
  world.client.subscribe("news");
  world.client.connect();
  await world.accept();
  world.socket.say({ type: "draining", retry_after_ms: 1_000 });
  await world.socket.heardOne("auth");
  world.socket.end(1012);
  assert.equal(world.retryInMs, 500);
  assert.deepEqual(
    world.statuses.map(({ state }) => state),
    ["connecting", "closed"],
  );
});

test("requests go on while an instance drains", async () => {
  const world = await World.open();
  world.socket.say({ type: "draining", retry_after_ms: 1_000 });
  const ping = world.client.ping();
  world.socket.say({ type: "pong", id: (await world.socket.heardOne("ping")).id });
  await ping;
});

test("not open in time: tried again, the late one is given up", async () => {
  const world = new World();
  world.client.connect();
  await settled();
  await world.clock.advance(10_000);
  const [first] = world.sockets;
  assert.deepEqual(world.client.status, {
    state: "closed",
    code: 1006,
    reason: "not open in time",
    retryInMs: 500,
  });
  assert.ok(first?.closedWith);
  first?.welcome();
  assert.equal(world.client.status.state, "closed");
  await world.comeBack();
  assert.equal(world.client.status.state, "open");
});

test("an error before the connection is open is its end, one after it is not", async () => {
  const world = new World();
  world.client.connect();
  await settled();
  world.socket.onerror?.({ message: "refused" });
  assert.deepEqual(world.client.status, { state: "closed", code: 1006, reason: "refused", retryInMs: 500 });
  await world.comeBack();
  world.socket.onerror?.({});
  assert.equal(world.client.status.state, "open");
});

test("a list of URLs is gone through, a function is asked each time", async () => {
  const world = new World({ user: "alice bob" }, ["ws://a/ws", "https://b/ws?x=1"]);
  world.client.connect();
  for (let n = 0; n < 3; n += 1) {
    await settled();
    world.socket.end(1006);
    await world.clock.advance(world.retryInMs ?? Number.NaN);
  }
  assert.deepEqual(
    world.sockets.slice(0, 3).map((socket) => socket.url),
    ["ws://a/ws?user=alice+bob", "wss://b/ws?x=1&user=alice+bob", "ws://a/ws?user=alice+bob"],
  );
  assert.equal(world.socket.protocol, "hubcast.v1");
  const asked = await World.open({}, async (attempt) => `ws://n${attempt}/ws`);
  asked.socket.end(1006);
  await asked.comeBack();
  assert.deepEqual(
    asked.sockets.map((socket) => socket.url),
    ["ws://n0/ws", "ws://n1/ws"],
  );
});

test("a URL that is none is reported and tried again", async () => {
  const world = new World({}, () => "not a url");
  world.client.connect();
  await settled();
  assert.equal(world.retryInMs, 500);
  assert.match(world.errors[0]?.message ?? "", /cannot connect/);
});

test("connect() while waiting tries now; close() while waiting ends it", async () => {
  const world = await World.open();
  world.socket.end(1006);
  world.client.connect();
  await world.accept();
  assert.equal(world.client.status.state, "open");
  world.client.connect();
  assert.equal(world.sockets.length, 2, "it is connected already");
  world.socket.end(1006);
  world.client.close();
  await world.clock.advance(60_000);
  assert.equal(world.sockets.length, 2);
  assert.equal(world.retryInMs, null);
});

test("close() in the middle of connecting", async () => {
  let give = (_: string): void => {};
  const world = new World({}, () => new Promise((resolve) => (give = resolve)));
  world.client.connect();
  world.client.close();
  give("ws://late/ws");
  await settled();
  assert.equal(world.sockets.length, 0);
  assert.equal(world.clock.timers, 0);
});

test("silence is probed, and a dead connection is left", async () => {
  const world = await World.open({ pingIntervalMs: 1_000, pongTimeoutMs: 100 });
  await world.clock.advance(600);
  world.socket.say({ type: "event", channel: "other", data: 1 });
  await world.clock.advance(999);
  assert.deepEqual(await world.socket.heard(), [], "something arrived meanwhile");
  await world.clock.advance(1);
  const { id } = await world.socket.heardOne("ping");
  world.socket.say({ type: "pong", id });
  await world.clock.advance(1_000);
  await world.socket.heardOne("ping");
  await world.clock.advance(99);
  assert.equal(world.client.status.state, "open");
  await world.clock.advance(1);
  assert.equal(world.retryInMs, 500);
  assert.deepEqual(world.client.status, {
    state: "closed",
    code: 1006,
    reason: "nothing arrived after a ping",
    retryInMs: 500,
  });
  assert.ok(world.socket.closedWith);
});

test("the gateway's own ping interval is the default", async () => {
  const clock = new World();
  const world = await World.open({ pingIntervalMs: undefined as never, clock: clock.clock });
  await clock.clock.advance(54_000);
  await world.socket.heardOne("ping");
});

test("a frame that nobody understands is reported, an unknown type passed over", async () => {
  const world = await World.open();
  world.socket.sayText("{");
  assert.ok(world.errors[0] instanceof HubcastError);
  world.socket.say({ type: "news from the future" });
  world.socket.say({ type: "error", code: "bad_request", message: "not JSON" });
  assert.deepEqual(
    world.errors.map((error) => error.code),
    ["failed", "bad_request"],
  );
  assert.equal(world.client.status.state, "open");
});

test("a hook or a listener that throws is reported, and the client goes on", async (t) => {
  const uncaught: unknown[] = [];
  const note = (error: unknown) => uncaught.push(error);
  const others = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException").on("uncaughtException", note);
  t.after(() => {
    process.removeListener("uncaughtException", note);
    for (const other of others) process.on("uncaughtException", other);
  });
  const world = await World.open({
    shouldReconnect: () => {
      throw "hook";
    },
  });
  world.client.on("status", () => {
    throw "listener";
  });
  world.socket.end(1006);
  await settled();
  assert.equal(world.retryInMs, 500);
  assert.deepEqual(uncaught, ["hook", "listener"]);
});
