"""What a linear head on several ranks sends and holds, computed: no machine is needed for it.

tests/test_ranks.py holds SENT against the collectives that are called.
"""

A, D, N = 151_936, 8_192, 8_192  # a vocabulary, features, tokens
RANKS = (1, 2, 4, 8, 16, 32, 64)
HALF, SINGLE = 2, 4  # bytes
TILE = 32 * 2**20  # dqn_fused.head.sweep.TILE on a GPU
AGREEMENT = 96  # bytes of each rank, before anything else

# Numbers of 32 bits for each sample, by collective, behind the agreement: the largest Q-value, with its index two; a
# sum of exponentials, two; a value that one rank has.
SENT = {
    "plain": [1, 1],
    "double": [2, 1, 1],
    "soft": [1, 2, 1],
    "cql": [2, 2, 1],
    "munchausen": [2, 4, 1, 1],
    "cql-munchausen-sum": [3, 6, 1, 1],
}
LOSSES = {
    "plain": ("DQN", 1),
    "double": ("double DQN", 2),
    "soft": ("soft target", 1),
    "cql": ("DQN with the conservative term", 2),
    "munchausen": ("Munchausen", 2),
    "cql-munchausen-sum": ("Munchausen with the conservative term", 3),
}  # and of how many Q matrices all actions are read


def sent(ranks: int = 8) -> str:
    """Markdown: collectives, and bytes that a rank sends, beside those of gathering Q-values."""
    lines = [
        "| loss | all-reduces | numbers a sample | sent by each rank | all-gather of Q would send |",
        "|---|---:|---:|---:|---:|",
    ]
    around = (ranks - 1) / ranks  # of a ring: an all-reduce sends everything twice
    for name, numbers in SENT.items():
        label, matrices = LOSSES[name]
        ours = 2 * around * SINGLE * N * sum(numbers)
        lines.append(
            f"| {label} | {len(numbers)} | {sum(numbers)} | {size(ours)} | {size(around * SINGLE * N * A * matrices)} |"
        )
    gradient = 2 * around * HALF * N * D
    return "\n".join(lines) + (
        f"\n\nOf {N:,} tokens, A = {A:,} and {ranks} ranks, by ring algorithms, Q-values and numbers of 32 bits. In "
        "half precision the conservative term needs one all-reduce more, of one number a sample. The "
        f"agreement in front is {AGREEMENT} bytes of each rank. In the backward the gradient of hidden is summed once, "
        f'{size(gradient)} in bfloat16, or not at all with `hidden_grad="partial"`.'
    )


def memory() -> str:
    """Markdown: bytes of a rank, by the number of ranks."""
    lines = [
        "| ranks | rows | weights | gradient | AdamW | states | tile | together | Q matrices, not built |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    states = 3 * HALF * N * D  # hidden, next_hidden and the gradient of hidden
    for ranks in RANKS:
        rows = -(-A // ranks)
        layer = rows * D
        parts = (2 * HALF * layer, HALF * layer, 3 * SINGLE * layer, states, TILE)
        matrices = 3 * HALF * N * rows  # of s, of s', and the gradient
        cells = [size(x) for x in (*parts, sum(parts), matrices)]
        lines.append(f"| {ranks} | {rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nOn paper: A = {A:,}, D = {D:,}, {N:,} tokens, bfloat16. Weights are those of the online and the target "
        "network; AdamW keeps a copy of the weight and two moments in float32; states are hidden, next_hidden and the "
        "gradient of hidden; the Q matrices are Q(s, .), Q(s', .) and the gradient, which eager code on sharded rows "
        "would have."
    )


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            return f"{count / unit:,.{1 if count < 100 * unit else 0}f} {name}"
    return f"{count:.0f} B"


def sections() -> dict[str, str]:
    """Name -> markdown, as reporting.report.sections has them."""
    return {"ranks/sent": sent(), "ranks/memory": memory()}
