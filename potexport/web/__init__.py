"""The browser runtime: TypeScript in `src/`, compiled into `page/`, and what serves it."""
