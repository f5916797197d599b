"""`update` as its callers meet it: jitted, with errors that explain a lost state, and an interrupt that loses none."""

import _thread
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["check_alive", "jit_update"]

Step = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]  # of static settings, state, args and kwargs


class jit_update:  # noqa: N801  # a function with a `lower`, as jit's; an attribute would go over to what wraps it
    """Jits a step, with its state donated, as a function `(state, *args, **kwargs)`.

    A state that was donated before, or by a step that failed, is told from JAX's other errors. Ctrl-C is an interrupt
    before the step or after it: what a step has given is not thrown away between the two.

    Args:
        step: The step.
        static: What of a state the program is made for, as a hashable value.
    """

    def __init__(self, step: Step, static: Callable[[Any], Any]) -> None:
        """Compiles nothing."""
        self._step, self._static = step, static
        self._trees: list[Any] = []  # of what the step gave, one for each kind
        self._jitted = jax.jit(self._flat_step, static_argnums=0, donate_argnums=1)

    def _flat_step(
        self, static: Any, state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[jax.Array], list[None]]:
        """Leaves, and as many None as the number of their tree: these JAX puts together without running any Python."""
        leaves, tree = jax.tree.flatten(self._step(static, state, args, kwargs))
        if tree not in self._trees:
            self._trees.append(tree)
        return leaves, [None] * self._trees.index(tree)

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Steps."""
        _raise_delayed_interrupt()
        given: list[Any] = []
        try:
            # No bytecode from the call until its result is in the list, so that no interrupt falls in between.
            given.extend(map(self._jitted, (self._static(state),), (state,), (args,), (kwargs,)))
        except KeyboardInterrupt as interrupt:
            if not given:
                _explain(interrupt, state)
                raise
            _delay_interrupt()
        except (RuntimeError, ValueError) as error:
            if "has been deleted" in str(error) or "deleted or donated" in str(error):
                check_alive(state)
            _explain(error, state)
            raise
        while True:
            try:
                leaves, number = given[0]
                return jax.tree.unflatten(self._trees[len(number)], leaves)
            except KeyboardInterrupt:
                _delay_interrupt()

    def __deepcopy__(self, memo: dict[int, Any]) -> "jit_update":
        """Itself, as of functions."""
        return self

    def lower(self, state: Any, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The step for ahead-of-time compilation, as jit's: `lower(state, *args).compile()(state, *args)`."""
        static = self._static(state)
        whole = jax.jit(lambda state, *args, **kwargs: self._step(static, state, args, kwargs), donate_argnums=0)
        return whole.lower(state, *args, **kwargs)


_KEEP = "To keep a state, copy it before: kept = jax.tree.map(jnp.copy, state)."


def _is_lost(state: Any) -> bool:
    """Whether an array of the state is gone."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    return any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves)


def check_alive(state: Any) -> None:
    """Raises a ValueError where a state was donated."""
    if _is_lost(state):
        raise ValueError(
            "state: it was given to an update before, which wrote the next state over it. Go on with what that "
            f"update returned: state, output = train.update(state, ...). {_KEEP}"
        ) from None


def _explain(error: BaseException, state: Any) -> None:
    """Adds to an error what became of the state, where it is gone."""
    if _is_lost(state):
        error.add_note(
            "state: the step that failed had begun to write over the state that was given to it, which is lost; the "
            f"last checkpoint has the state of an earlier step. {_KEEP}"
        )


# The interrupt that waits for the caller to have stored the state. One for the process, as its signals are.
_delayed: list[threading.Timer] = []


def _delay_interrupt() -> None:
    """Interrupts the next update before it begins or, where none begins, the main thread in a moment."""

    def interrupt() -> None:
        if _delayed:
            _delayed.clear()
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            else:  # Windows, where it does not wake one that sleeps
                _thread.interrupt_main()

    if not _delayed:
        _delayed.append(threading.Timer(0.05, interrupt))
        _delayed[0].daemon = True
        _delayed[0].start()


def _raise_delayed_interrupt() -> None:
    if _delayed and threading.current_thread() is threading.main_thread():
        _delayed.pop().cancel()
        raise KeyboardInterrupt
