// Typed events.

import { guarded } from "./guarded.js";

type Listener<Event> = (event: Event) => void;

export abstract class Emitter<Events> {
  readonly #listeners = new Map<keyof Events, Set<Listener<never>>>();

  /** Calls `listener` at each event of this type. Returns what takes it off again. */
  on<Type extends keyof Events>(type: Type, listener: Listener<Events[Type]>): () => void {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    return () => this.off(type, listener);
  }

  off<Type extends keyof Events>(type: Type, listener: Listener<Events[Type]>): void {
    this.#listeners.get(type)?.delete(listener);
  }

  /** True if somebody listened. A listener that throws keeps nobody else from hearing. */
  protected emit<Type extends keyof Events>(type: Type, event: Events[Type]): boolean {
    const listeners = [...(this.#listeners.get(type) ?? [])] as Listener<Events[Type]>[];
    for (const listener of listeners) guarded(() => listener(event), undefined);
    return listeners.length > 0;
  }
}
