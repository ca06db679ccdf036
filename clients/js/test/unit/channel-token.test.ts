// Tokens of single channels.

import assert from "node:assert/strict";
import { test } from "node:test";
import type { Subscription, TokenRequest } from "../../src/index.js";
import { World } from "./fake.js";

/** What a subscription tells of its life. */
function told(subscription: Subscription): unknown[][] {
  const all: unknown[][] = [];
  subscription.on("subscribed", ({ recovered }) => all.push(["subscribed", recovered]));
  subscription.on("unsubscribed", ({ reason }) => all.push(["unsubscribed", reason]));
  subscription.on("error", ({ code }) => all.push(["error", code]));
  return all;
}

/** Gives t1, t2, …; `requests` are what it was asked. */
function numbered(): { token: (request: TokenRequest) => string; requests: boolean[] } {
  const requests: boolean[] = [];
  return { requests, token: ({ isRefused }) => `t${requests.push(isRefused)}` };
}

/** Answers the one subscribe that was sent, with this token. */
async function answer(world: World, token: string, frame: object): Promise<void> {
  const sent = await world.socket.heardOne("subscribe");
  assert.equal(sent.token, token);
  world.socket.say({ id: sent.id, channel: sent.channel, message: "", ...frame });
}

function expire(world: World): void {
  world.socket.say({ type: "unsubscribed", channel: "room", reason: "token_expired" });
}

test("asked for at every subscribe", async () => {
  const { token, requests } = numbered();
  const world = await World.open();
  const room = world.client.subscribe("room", { token: async (request) => token(request) });
  const all = told(room);
  await answer(world, "t1", { type: "subscribed", cursor: "1" });
  world.socket.end(1006);
  await world.comeBack();
  await answer(world, "t2", { type: "subscribed", cursor: "1", recovered: true });
  room.unsubscribe();
  await world.socket.heardOne("unsubscribe");
  room.subscribe();
  await answer(world, "t3", { type: "subscribed", cursor: "1", recovered: true });
  assert.deepEqual(requests, [false, false, false]);
  assert.deepEqual(all, [
    ["subscribed", undefined],
    ["subscribed", true],
    ["subscribed", true],
  ]);
});

test("expired: renewed, and told by subscribed alone", async () => {
  const { token, requests } = numbered();
  const world = await World.open();
  const room = world.client.subscribe("room", { token });
  const all = told(room);
  await answer(world, "t1", { type: "subscribed" });
  expire(world);
  assert.equal(room.state, "subscribing");
  await answer(world, "t2", { type: "subscribed" });
  expire(world);
  await answer(world, "t3", { type: "error", code: "unauthorized" });
  assert.deepEqual(await world.socket.heard(), []);
  assert.equal(room.state, "unsubscribed");
  assert.deepEqual(requests, [false, true, true]);
  assert.deepEqual(all, [
    ["subscribed", undefined],
    ["subscribed", false],
    ["error", "unauthorized"],
    ["unsubscribed", "unauthorized"],
  ]);
});

test("refused: asked for once anew, and so again after subscribe()", async () => {
  const { token, requests } = numbered();
  const world = await World.open();
  const room = world.client.subscribe("room", { token });
  const all = told(room);
  await answer(world, "t1", { type: "error", code: "unauthorized" });
  await answer(world, "t2", { type: "error", code: "forbidden" });
  assert.deepEqual(await world.socket.heard(), []);
  room.subscribe();
  await answer(world, "t3", { type: "error", code: "forbidden" });
  await answer(world, "t4", { type: "subscribed" });
  assert.deepEqual(requests, [false, true, false, true]);
  assert.deepEqual(all, [
    ["error", "forbidden"],
    ["unsubscribed", "forbidden"],
    ["subscribed", undefined],
  ]);
});

test("what a new token does not help is final", async () => {
  const { token, requests } = numbered();
  const world = await World.open();
  const room = world.client.subscribe("room", { token });
  const all = told(room);
  await answer(world, "t1", { type: "subscribed" });
  for (const reason of ["forbidden", "backend"]) {
    world.socket.say({ type: "unsubscribed", channel: "room", reason });
    room.subscribe();
    await answer(world, `t${requests.length + 1}`, { type: "subscribed" });
  }
  world.socket.say({ type: "unsubscribed", channel: "room", reason: "backend" });
  room.subscribe();
  await answer(world, "t4", { type: "error", code: "limit_exceeded" });
  assert.deepEqual(await world.socket.heard(), []);
  assert.deepEqual(requests, [false, false, false, false]);
  assert.deepEqual(all.at(-1), ["unsubscribed", "limit_exceeded"]);
});

test("a token that is only text ends with its subscription", async () => {
  const world = await World.open();
  const room = world.client.subscribe("room", { token: "t" });
  const all = told(room);
  await answer(world, "t", { type: "subscribed" });
  expire(world);
  room.subscribe();
  await answer(world, "t", { type: "error", code: "unauthorized" });
  assert.deepEqual(await world.socket.heard(), []);
  assert.deepEqual(all, [
    ["subscribed", undefined],
    ["unsubscribed", "token_expired"],
    ["error", "unauthorized"],
    ["unsubscribed", "unauthorized"],
  ]);
});

test("a function that throws is asked again later, one without a token ends the subscription", async () => {
  const answers: (() => string)[] = [
    () => {
      throw new Error("no network");
    },
    () => "t",
  ];
  const world = await World.open();
  const room = world.client.subscribe("room", { token: () => answers.shift()?.() ?? null });
  const all = told(room);
  assert.deepEqual(await world.socket.heard(), []);
  await world.clock.advance(500);
  await answer(world, "t", { type: "subscribed" });
  expire(world);
  assert.deepEqual(await world.socket.heard(), []);
  assert.equal(world.clock.timers, 0);
  assert.deepEqual(all, [
    ["error", "failed"],
    ["subscribed", undefined],
    ["unsubscribed", "unauthorized"],
  ]);
});

test("one that comes too late is not used", async () => {
  const gives: ((token: string) => void)[] = [];
  const world = await World.open();
  const room = world.client.subscribe("room", { token: () => new Promise((give) => gives.push(give)) });
  room.unsubscribe();
  assert.deepEqual(await world.socket.heard(), [], "the gateway never heard of it");
  room.subscribe();
  world.socket.end(1006);
  await world.comeBack();
  assert.equal(gives.length, 3);
  for (const give of gives.slice(0, 2)) give("late");
  assert.deepEqual(await world.socket.heard(), []);
  gives[2]?.("t3");
  await answer(world, "t3", { type: "subscribed" });
});

test("what functions give in one go leaves in one frame", async () => {
  const world = await World.open();
  for (const channel of ["a", "b", "c"]) {
    world.client.subscribe(channel, { token: channel === "b" ? async () => "t" : () => "t" });
  }
  assert.equal((await world.socket.heard()).length, 3);
  assert.equal(world.socket.frames, 1);
});
