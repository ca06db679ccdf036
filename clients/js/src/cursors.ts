// The cursors that a subscription has passed lately: what comes a second time is dropped.

/** More than the gateway replays at once by default (100), so that a whole replay is recognised. */
const CURSORS_MAX = 1024;

export class Cursors {
  // A Set keeps the order in which they came.
  readonly #passed = new Set<string>();

  /** Notes a cursor. False: it was passed before. */
  pass(cursor: string): boolean {
    if (this.#passed.has(cursor)) return false;
    this.#passed.add(cursor);
    if (this.#passed.size > CURSORS_MAX) {
      for (const oldest of this.#passed) {
        this.#passed.delete(oldest);
        break;
      }
    }
    return true;
  }
}
