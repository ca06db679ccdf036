// Where the next attempt goes.

import { HubcastError } from "./errors.js";
import type { Urls } from "./options.js";

/** The address for this attempt; `turn` counts all attempts of the client, so that a list is gone through. */
export async function address(urls: Urls, turn: number): Promise<URL> {
  const given =
    typeof urls === "function"
      ? await urls(turn)
      : typeof urls === "string"
        ? urls
        : urls[turn % urls.length];
  if (given === undefined) throw new HubcastError("failed", "the list of URLs is empty", "not_sent");
  // A page may say "/ws".
  const url = new URL(given, globalThis.location?.href);
  url.protocol = url.protocol.replace("http", "ws");
  return url;
}
