// A page that is looked at again, and a network that is back.

import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { World } from "./fake.js";

/** Knows how many listen. */
class Target extends EventTarget {
  visibilityState = "visible";
  listeners = 0;

  override addEventListener(...listener: Parameters<EventTarget["addEventListener"]>): void {
    this.listeners += 1;
    super.addEventListener(...listener);
  }

  override removeEventListener(...listener: Parameters<EventTarget["removeEventListener"]>): void {
    this.listeners -= 1;
    super.removeEventListener(...listener);
  }
}

/** The parts of a browser that matter here. */
function browser(t: TestContext): { page: Target; network: Target } {
  const page = new Target();
  const network = new Target();
  Object.assign(globalThis, { document: page, window: network });
  t.after(() => {
    for (const name of ["document", "window"]) Reflect.deleteProperty(globalThis, name);
  });
  return { page, network };
}

test("a page that is looked at again asks whether the connection is alive", async (t) => {
  const { page } = browser(t);
  const world = await World.open({ pongTimeoutMs: 100 });
  page.visibilityState = "hidden";
  page.dispatchEvent(new Event("visibilitychange"));
  assert.deepEqual(await world.socket.heard(), []);
  page.visibilityState = "visible";
  page.dispatchEvent(new Event("visibilitychange"));
  page.dispatchEvent(new Event("visibilitychange"));
  await world.socket.heardOne("ping");
  await world.clock.advance(100);
  assert.equal(world.client.status.state, "closed");
});

test("a network that is back ends the waiting, but not that of who was told to wait", async (t) => {
  const { page, network } = browser(t);
  const world = await World.open();
  world.socket.end(1006);
  network.dispatchEvent(new Event("online"));
  await world.accept();
  assert.equal(world.client.status.state, "open");
  world.socket.end(4101);
  network.dispatchEvent(new Event("online"));
  assert.equal(world.client.status.state, "closed");
  await world.comeBack();
  world.client.close();
  assert.deepEqual([page.listeners, network.listeners], [0, 0]);
});
