// The connection's token: shown, and kept up while the connection lives.

import assert from "node:assert/strict";
import { test } from "node:test";
import { inspect } from "node:util";
import type { Options } from "../../src/index.js";
import { FakeSocket, settled, World } from "./fake.js";

const HOUR_MS = 3_600_000;

test("a token at every connect, a new one after 3000, and no third try with a refused one", async () => {
  const requests: boolean[] = [];
  const world = await World.open({
    getToken: async ({ isRefused }) => {
      requests.push(isRefused);
      return `t${requests.length}`;
    },
  });
  assert.equal(world.socket.url, "ws://test/ws?token=t1");
  world.socket.end(3000, "token expired");
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  assert.equal(world.socket.url, "ws://test/ws?token=t2");
  world.socket.end(3000, "unauthorized");
  assert.equal(world.retryInMs, null);
  assert.deepEqual(requests, [false, true]);
});

test("getToken that fails is tried again, one that has none gives up", async () => {
  const tokens: (() => string | null)[] = [
    () => {
      throw new Error("no network");
    },
    () => null,
  ];
  const world = new World({ getToken: () => tokens.shift()?.() ?? null });
  world.client.connect();
  await settled();
  assert.match(world.errors[0]?.message ?? "", /no network/);
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  assert.deepEqual(world.client.status, {
    state: "closed",
    code: 3000,
    reason: "there is no token",
    retryInMs: null,
  });
  assert.equal(world.sockets.length, 0);
});

test("what a platform says of a URL that it does not take tells no token", async () => {
  class Refusing extends FakeSocket {
    constructor(url: string, protocol: string) {
      super(url, protocol);
      throw new SyntaxError(`the URL '${url}' is not allowed here`);
    }
  }
  const world = new World({ getToken: () => "canary", user: "alice", WebSocket: Refusing });
  world.client.connect();
  await settled();
  const [error] = world.errors;
  assert.equal(error?.message, "cannot connect: the URL 'ws://test/ws' is not allowed here");
  // As the console shows it, with what caused it.
  assert.doesNotMatch(inspect(error), /canary/);
});

test("a token in the auth command: nothing else before its answer", async () => {
  const world = new World({ getToken: () => "t", tokenIn: "command" });
  world.client.subscribe("news");
  world.client.connect();
  await world.accept();
  assert.equal(world.socket.url, "ws://test/ws");
  const auth = await world.socket.heardOne("auth");
  assert.equal(auth.token, "t");
  assert.equal(world.client.status.state, "connecting");
  world.socket.say({ type: "authenticated", id: auth.id });
  assert.equal(world.client.status.state, "open");
  await world.socket.heardOne("subscribe");
});

test("a token that the auth command refuses is like 3000", async () => {
  const world = new World({ getToken: () => "t", tokenIn: "command" });
  world.client.connect();
  for (const retryInMs of [1_500, null]) {
    await world.accept();
    const { id } = await world.socket.heardOne("auth");
    world.socket.say({ type: "error", id, code: "unauthorized", message: "expired" });
    assert.deepEqual(world.client.status, { state: "closed", code: 3000, reason: "expired", retryInMs });
    assert.ok(world.socket.closedWith, "the socket is not left open");
    await world.clock.advance(retryInMs ?? 0);
  }
});

test("the attempt after one that failed shows its token by the command, where it is told that it is refused", async () => {
  const requests: boolean[] = [];
  const world = new World({
    getToken: ({ isRefused }) => {
      requests.push(isRefused);
      return isRefused ? "new" : "cached";
    },
  });
  world.client.connect();
  await settled();
  assert.equal(world.socket.url, "ws://test/ws?token=cached");
  // 401, which a page does not see.
  world.socket.end(1006);
  await world.comeBack();
  assert.equal(world.socket.url, "ws://test/ws");
  const refused = await world.socket.heardOne("auth");
  world.socket.say({ type: "error", id: refused.id, code: "unauthorized", message: "no" });
  assert.equal(world.retryInMs, 1_000 + 0.5 * 2_000);
  await world.comeBack();
  assert.equal(world.socket.url, "ws://test/ws?token=new");
  assert.equal(world.client.status.state, "open");
  world.socket.end(1006);
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  assert.equal(world.socket.url, "ws://test/ws?token=cached");
  assert.deepEqual(requests, [false, false, true, false]);
});

test("a refused token stays refused while attempts fail for another reason", async () => {
  const requests: boolean[] = [];
  const world = await World.open({
    getToken: ({ isRefused }) => {
      requests.push(isRefused);
      return "t";
    },
  });
  world.socket.end(3000, "token revoked");
  assert.equal(world.retryInMs, 1_500, "not within the second in which it was revoked");
  await world.clock.advance(1_500);
  world.socket.end(1006);
  await world.comeBack();
  const { id } = await world.socket.heardOne("auth");
  world.socket.say({ type: "error", id, code: "unauthorized", message: "no" });
  assert.equal(world.retryInMs, null);
  assert.deepEqual(requests, [false, true, true]);
});

/** A world whose connection has a token that is good for so long; `requests` are when others were asked for. */
async function kept(
  expiresInMs: number,
  getToken: NonNullable<Options["getToken"]> = () => "next",
): Promise<{ world: World; requests: [number, boolean][] }> {
  const requests: [number, boolean][] = [];
  let isFirst = true;
  const world = new World({
    getToken: (request) => {
      if (isFirst) {
        isFirst = false;
        return "first";
      }
      requests.push([world.clock.now(), request.isRefused]);
      return getToken(request);
    },
  });
  // The longest of all delays.
  world.random = 1;
  world.client.connect();
  await settled();
  world.socket.welcome({}, { authenticated: true, user: "alice", expires_in_ms: expiresInMs });
  return { world, requests };
}

test("a token is refreshed on the live connection, again and again", async () => {
  const { world, requests } = await kept(HOUR_MS);
  await world.clock.advance(0.8 * HOUR_MS - 1);
  assert.deepEqual(await world.socket.heard(), []);
  await world.clock.advance(1);
  const first = await world.socket.heardOne("auth");
  assert.equal(first.token, "next");
  world.socket.say({ type: "authenticated", id: first.id, user: "alice", expires_in_ms: 60_000 });
  await world.clock.advance(48_000);
  const second = await world.socket.heardOne("auth");
  world.socket.say({ type: "authenticated", id: second.id });
  await world.clock.advance(HOUR_MS);
  assert.deepEqual(await world.socket.heard(), [], "nobody wants one any more");
  assert.deepEqual(requests, [
    [0.8 * HOUR_MS, false],
    [0.8 * HOUR_MS + 48_000, false],
  ]);
  assert.deepEqual(
    world.statuses.map(({ state }) => state),
    ["connecting", "open"],
  );
});

test("a token that the auth command showed is refreshed, too", async () => {
  const world = new World({ getToken: () => "t", tokenIn: "command" });
  world.random = 1;
  world.client.connect();
  await settled();
  world.socket.welcome({}, { authenticated: false });
  const { id } = await world.socket.heardOne("auth");
  world.socket.say({ type: "authenticated", id, expires_in_ms: 100_000 });
  await world.clock.advance(79_999);
  assert.deepEqual(await world.socket.heard(), []);
  await world.clock.advance(1);
  await world.socket.heardOne("auth");
});

test("early enough, at random, and not too often", async () => {
  for (const [expiresInMs, random, expected] of [
    [HOUR_MS, 0, 0.72 * HOUR_MS],
    [HOUR_MS, 0.5, 0.76 * HOUR_MS],
    [20_000, 1, 15_000],
    [12_000, 1, 7_000],
    [6_000, 1, 3_000],
    [2_000, 1, 1_000],
    [1_000, 1, undefined],
    [0, 1, undefined],
  ] as const) {
    const world = new World({ getToken: () => "t" });
    world.random = random;
    world.client.connect();
    await settled();
    world.socket.welcome({}, { expires_in_ms: expiresInMs });
    const waits = expected ?? HOUR_MS;
    await world.clock.advance(waits - 1);
    assert.deepEqual(await world.socket.heard(), [], `${expiresInMs} ms, chance ${random}`);
    await world.clock.advance(1);
    assert.equal((await world.socket.heard()).length, expected === undefined ? 0 : 1, `${expiresInMs} ms`);
  }
});

test("a token that lives for longer than timers can wait", async () => {
  const lifeMs = 60 * 24 * HOUR_MS;
  const { world, requests } = await kept(lifeMs);
  await world.clock.advance(lifeMs);
  assert.deepEqual(requests[0], [0.8 * lifeMs, false]);
});

test("getToken that fails or has none: reported, tried again, and the end is the gateway's", async () => {
  let isBroken = true;
  const { world, requests } = await kept(100_000, () => {
    if (!isBroken) return null;
    isBroken = false;
    throw new Error("no network");
  });
  await world.clock.advance(200_000);
  assert.deepEqual(requests.slice(0, 3), [
    [80_000, false],
    [95_000, false],
    [97_500, false],
  ]);
  assert.ok(requests.length < 8, `${requests.length} requests`);
  assert.equal(world.errors[0]?.message, "cannot refresh the token: no network");
  assert.equal(world.errors[1]?.message, "cannot refresh the token: there is none");
  assert.deepEqual(await world.socket.heard(), []);
  assert.equal(world.client.status.state, "open");
  world.socket.end(3000, "token expired");
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  assert.equal(requests.at(-1)?.[1], true);
  assert.equal(world.retryInMs, null);
});

test("a refresh that is not answered, or refused: reported, and the close is as ever", async () => {
  const { world, requests } = await kept(100_000);
  await world.clock.advance(80_000);
  await world.socket.heardOne("auth");
  await world.clock.advance(10_000);
  assert.equal(world.errors[0]?.code, "timeout");
  await world.clock.advance(5_000);
  const { id } = await world.socket.heardOne("auth");
  world.socket.say({ type: "error", id, code: "unauthorized", message: "no" });
  assert.equal(world.errors[1]?.code, "unauthorized");
  world.socket.end(3000, "no");
  await world.comeBack();
  assert.deepEqual(
    requests.map(([, isRefused]) => isRefused),
    [false, false, true],
  );
});

test("nothing is refreshed on a connection that is over", async () => {
  const gives: ((token: string) => void)[] = [];
  const { world } = await kept(100_000, () => new Promise((resolve) => gives.push(resolve)));
  await world.clock.advance(80_000);
  world.socket.end(1006);
  await world.clock.advance(world.retryInMs ?? Number.NaN);
  gives[1]?.("of the second connection");
  await world.accept();
  gives[0]?.("late");
  assert.deepEqual(await world.socket.heard(), []);
  assert.equal(world.clock.timers, 0);
});

test("a refresh leaves nothing behind, whenever the client is closed", async () => {
  for (const when of ["before", "unanswered"]) {
    const { world, requests } = await kept(100_000);
    if (when === "unanswered") await world.clock.advance(80_000);
    const asked = requests.length;
    world.client.close();
    assert.equal(world.clock.timers, 0, when);
    await world.clock.advance(HOUR_MS);
    assert.equal(requests.length, asked, when);
    assert.deepEqual(world.errors, [], when);
  }
  const { world } = await kept(100_000, () => null);
  world.client.on("error", () => world.client.close());
  await world.clock.advance(80_000);
  assert.equal(world.client.status.state, "closed");
  assert.equal(world.clock.timers, 0);
});

test("a token that nobody can renew is not kept up", async () => {
  const world = new World();
  world.client.connect();
  await settled();
  world.socket.welcome({}, { authenticated: true, expires_in_ms: 100_000 });
  assert.equal(world.clock.timers, 0);
});
