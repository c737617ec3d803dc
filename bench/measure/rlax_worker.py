"""rlax's Q-learning losses under jax.jit, asked over pipes: ``python -m bench.measure.rlax_worker``.

One request a line. ``load IN.npz OUT.npz``: compile for these arguments, write loss and gradient; answers ``loaded``.
``run K``: make K calls; answers the seconds they took. The end of the input ends it.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rlax


def loss(
    q: Any, actions: Any, rewards: Any, next_q: Any, terminated: Any, gamma: Any, next_q_online: Any = None
) -> Any:
    """Mean of the squared TD errors; rlax.l2_loss would halve them."""
    discount = gamma * (1 - terminated.astype(jnp.float32))
    if next_q_online is None:
        td = jax.vmap(rlax.q_learning)(q, actions, rewards, discount, next_q)
    else:
        td = jax.vmap(rlax.double_q_learning)(q, actions, rewards, discount, next_q, next_q_online)
    return jnp.mean(jnp.square(td))


def load(source: str, answer: str) -> Callable[[], Any]:
    with np.load(source) as file:
        arguments = {name: jnp.asarray(file[name]) for name in file.files}
    loss_and_grad = jax.jit(jax.value_and_grad(loss))
    q = arguments.pop("q")
    more = {} if "next_q_online" not in arguments else {"next_q_online": arguments.pop("next_q_online")}

    def call() -> Any:
        return jax.block_until_ready(loss_and_grad(q, **arguments, **more))

    value, grad = call()
    np.savez(answer, loss=np.asarray(value), grad=np.asarray(grad))
    return call


def timed(call: Callable[[], Any], repeats: int) -> float:
    time.sleep(0.002)  # until the threads of the process that asks have stopped spinning
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def main() -> None:
    call: Callable[[], Any] | None = None
    for line in sys.stdin:
        what, *rest = line.rstrip("\n").split("\t")
        if what == "load":
            call = load(*rest)
            print("loaded", flush=True)
        else:
            assert call is not None, "nothing is loaded"
            print(timed(call, int(rest[0])), flush=True)


if __name__ == "__main__":
    main()
