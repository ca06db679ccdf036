// What was published, as a subscriber gets it.

import type { EventFrame } from "./protocol.js";

export class Publication<Data = unknown> {
  readonly channel: string;
  /** The position right after this publication, where the channel has history. Opaque: compare for equality only. */
  readonly cursor: string | undefined;
  /** The JSON that was published; `undefined` for bytes that are no text. */
  readonly data: Data;
  readonly #base64: string | undefined;
  #bytes: Uint8Array | undefined;

  /** @internal */
  constructor(frame: EventFrame) {
    this.channel = frame.channel;
    this.cursor = frame.cursor;
    this.data = frame.data as Data;
    this.#base64 = frame.data_base64;
  }

  /** The payload if it is neither JSON nor text; decoded when first asked for. */
  get bytes(): Uint8Array | undefined {
    if (this.#bytes === undefined && this.#base64 !== undefined) {
      const letters = atob(this.#base64);
      this.#bytes = new Uint8Array(letters.length);
      for (let n = 0; n < letters.length; n += 1) this.#bytes[n] = letters.charCodeAt(n);
    }
    return this.#bytes;
  }
}
