"""The examples that sit inside other libraries: their first hundred losses are those of the library's own code.

They train in float64. In float32 what two codes round otherwise grows with each update, by as much as the processor
makes of it, and in the end another action is explored.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import assert_agree
from torch import Tensor

ROOT = Path(__file__).parents[1]
LOSSES = 100
GROWTH = 2.0**10  # of roundings, in a hundred updates of Adam


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Float64, and one thread for small layers."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def assert_same_losses(got: list[float], expected: list[float]) -> None:
    assert len(got) == len(expected) >= LOSSES
    assert_agree(torch.tensor(got), torch.tensor(expected), GROWTH * max(map(abs, expected)))
    assert len(set(got)) > LOSSES // 2  # they do change


def wide_features() -> type:
    """Observations as float64, to which Stable-Baselines3 gives float32."""
    from stable_baselines3.common.torch_layers import FlattenExtractor

    class Wide(FlattenExtractor):
        def forward(self, observations: Tensor) -> Tensor:
            return super().forward(observations).double()

    return Wide


def train_on_cartpole(kind: Any, **options: Any) -> tuple[list[float], Any]:
    """Train an algorithm of Stable-Baselines3: its losses, and itself."""
    settings: dict[str, Any] = {
        "seed": 3, "device": "cpu", "learning_rate": 1e-3, "buffer_size": 1000, "learning_starts": 50,
        "train_freq": 1, "target_update_interval": 20, "policy_kwargs": {"net_arch": [32]},
        "gamma": 63 / 64,  # which the library multiplies with flags of float32
    }  # fmt: skip
    settings |= options
    settings["policy_kwargs"] = {**settings["policy_kwargs"], "features_extractor_class": wide_features()}
    losses: list[float] = []

    class Recorded(kind):  # type: ignore[misc]
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            super().train(gradient_steps, batch_size)
            losses.append(float(self.logger.name_to_value["train/loss"]))

    model = Recorded("MlpPolicy", "CartPole-v1", **settings)
    model.learn(50 + LOSSES)
    return losses, model


def assert_same_training(fused: Any, plain: Any, **options: Any) -> None:
    """Two algorithms of Stable-Baselines3 have the same losses, and the same parameters after them."""
    got, fused_model = train_on_cartpole(fused, **options)
    expected, plain_model = train_on_cartpole(plain, **options)
    assert_same_losses(got, expected)
    assert fused_model._n_updates == plain_model._n_updates
    for x, y in zip(fused_model.policy.parameters(), plain_model.policy.parameters(), strict=True):
        assert_agree(x.detach(), y.detach(), GROWTH)


class TestStableBaselines:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("stable_baselines3")

    @pytest.mark.parametrize(
        "options",
        [{}, {"n_steps": 3}, {"max_grad_norm": 0.01}, {"gradient_steps": 2}],
        ids=["plain", "n_step", "clipped", "two_steps"],
    )
    def test_same_as_the_library(self, options: dict[str, Any]) -> None:
        from stable_baselines3 import DQN

        from examples.sb3_dqn import FusedDQN

        assert_same_training(FusedDQN, DQN, **options)

    def test_double_dqn(self, tmp_path: Path) -> None:
        """Against the lines of SB3 with the next action chosen by the online network."""
        import torch.nn.functional as F
        from stable_baselines3 import DQN

        from examples.sb3_dqn import FusedDQN

        class Double(DQN):
            def train(self, gradient_steps: int, batch_size: int = 100) -> None:
                assert self.replay_buffer is not None
                self.policy.set_training_mode(True)
                batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
                with torch.no_grad():
                    best = self.q_net(batch.next_observations).argmax(1, keepdim=True)
                    value = self.q_net_target(batch.next_observations).gather(1, best)
                    target = batch.rewards + (1 - batch.dones) * self.gamma * value
                loss = F.smooth_l1_loss(self.q_net(batch.observations).gather(1, batch.actions.long()), target)
                self.policy.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
                self.logger.record("train/loss", loss.item())

        # An old target network, whose choice is not the online one's.
        options = {"learning_rate": 1e-2, "target_update_interval": 10_000}
        got, model = train_on_cartpole(FusedDQN, double=True, **options)
        assert_same_losses(got, train_on_cartpole(Double, **options)[0])
        assert got != train_on_cartpole(FusedDQN, **options)[0]
        model.save(tmp_path / "model.zip")
        assert FusedDQN.load(tmp_path / "model.zip").double is True


EIGHT_QUANTILES = {"net_arch": [32], "n_quantiles": 8}  # whose midpoints the library has in float32 without rounding


class TestStableBaselinesContrib:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("sb3_contrib")

    @pytest.mark.parametrize(
        "options",
        [{}, {"n_steps": 3}, {"max_grad_norm": 0.01}, {"gradient_steps": 2}],
        ids=["plain", "n_step", "clipped", "two_steps"],
    )
    def test_same_as_the_library(self, options: dict[str, Any]) -> None:
        from sb3_contrib import QRDQN

        from examples.sb3_qrdqn import FusedQRDQN

        assert_same_training(FusedQRDQN, QRDQN, policy_kwargs=EIGHT_QUANTILES, **options)

    def test_double_dqn(self, tmp_path: Path) -> None:
        """Against the library's loss of the quantiles that the online network chooses."""
        from sb3_contrib import QRDQN
        from sb3_contrib.common.utils import quantile_huber_loss

        from examples.sb3_qrdqn import FusedQRDQN

        class Double(QRDQN):
            def train(self, gradient_steps: int, batch_size: int = 100) -> None:
                assert self.replay_buffer is not None
                self.policy.set_training_mode(True)
                batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
                rows = torch.arange(batch_size)
                with torch.no_grad():
                    best = self.quantile_net(batch.next_observations).mean(1).argmax(1)
                    value = self.quantile_net_target(batch.next_observations)[rows, :, best]
                    target = batch.rewards + (1 - batch.dones) * self.gamma * value
                predicted = self.quantile_net(batch.observations)[rows, :, batch.actions.flatten().long()]
                loss = quantile_huber_loss(predicted, target)
                self.policy.optimizer.zero_grad()
                loss.backward()
                self.policy.optimizer.step()
                self.logger.record("train/loss", loss.item())

        # An old target network, whose choice is not the online one's.
        options = {"learning_rate": 1e-2, "target_update_interval": 10_000, "policy_kwargs": EIGHT_QUANTILES}
        got, model = train_on_cartpole(FusedQRDQN, double=True, **options)
        assert_same_losses(got, train_on_cartpole(Double, **options)[0])
        assert got != train_on_cartpole(FusedQRDQN, **options)[0]
        model.save(tmp_path / "model.zip")
        assert FusedQRDQN.load(tmp_path / "model.zip").double is True


class TestTorchRL:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("torchrl")

    @pytest.mark.parametrize("loss_function", ["l2", "smooth_l1", "l1"])
    @pytest.mark.parametrize("double", [False, True], ids=["max", "double"])
    def test_same_as_the_library(self, double: bool, loss_function: str) -> None:
        from torchrl.objectives import DQNLoss

        from examples.torchrl_dqn import FusedDQN, train, value_network

        losses = []
        for kind in (FusedDQN, DQNLoss):
            torch.manual_seed(1)
            module = kind(
                value_network(4, 2),
                loss_function=loss_function,
                delay_value=True,
                double_dqn=double,
                action_space="categorical",
            )
            losses.append(train(module, LOSSES))
        assert_same_losses(*losses)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("action_space", ["categorical", "one-hot"])
    def test_priorities_weights_and_steps(self, action_space: str, reduction: str) -> None:
        """What a prioritised n-step buffer gives and takes."""
        import torch.nn.functional as F
        from torchrl.objectives import DQNLoss

        from examples.torchrl_dqn import FusedDQN, transitions, value_network

        torch.manual_seed(0)
        batch = transitions(16, 4, 3)
        batch["priority_weight"] = torch.rand(16)
        batch["steps_to_next_obs"] = torch.randint(1, 4, (16, 1))
        if action_space == "one-hot":
            batch["action"] = F.one_hot(batch["action"], 3)
        found = []
        for kind in (FusedDQN, DQNLoss):
            torch.manual_seed(1)
            module = kind(value_network(4, 3), action_space=action_space, double_dqn=False, reduction=reduction)
            module.make_value_estimator(gamma=0.9)
            data = batch.clone()
            loss = module(data)["loss"]
            loss.sum().backward()
            found.append([loss.detach(), data["td_error"], *(p.grad for p in module.parameters() if p.requires_grad)])
        assert_agree(*found)

    def test_what_it_refuses(self) -> None:
        from torchrl.objectives import ValueEstimators

        from examples.torchrl_dqn import FusedDQN, transitions, value_network

        batch = transitions(8, 4, 3)
        module = FusedDQN(value_network(4, 3), action_space="categorical")
        batch["mask"] = torch.ones(8, dtype=torch.bool)
        module._loss_mask_key = "mask"
        with pytest.raises(NotImplementedError, match="loss mask: expected none"):
            module(batch)
        module = FusedDQN(value_network(4, 3), action_space="categorical")
        module.make_value_estimator(ValueEstimators.TDLambda)
        with pytest.raises(NotImplementedError, match="value estimator: expected TD0"):
            module(transitions(8, 4, 3))


class TestCleanRL:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        pytest.importorskip("gymnasium")

    def test_same_as_its_own_lines(self) -> None:
        import gymnasium as gym
        import numpy as np

        from examples.cleanrl_dqn import parse_args, train

        if "float64/CartPole-v1" not in gym.registry:
            gym.register(
                "float64/CartPole-v1",
                lambda: gym.wrappers.DtypeObservation(gym.make("CartPole-v1"), np.float64),  # type: ignore[arg-type]
            )
        short = [
            "--env-id",
            "float64/CartPole-v1",
            "--total-timesteps",
            "1500",
            "--learning-starts",
            "450",
            "--target-network-frequency",
            "100",
        ]
        losses = [train(parse_args([*short, "--loss", name]), report=lambda line: None) for name in ("fused", "eager")]
        assert_same_losses(*losses)


class TestCartPole:
    @pytest.fixture(autouse=True)
    def library(self) -> None:
        for name in ("gymnasium", "matplotlib", "tqdm"):
            pytest.importorskip(name)

    def losses(self, **options: Any) -> list[float]:
        """Of updates on random transitions."""
        from examples.cartpole import Args, Batch, QNetwork, Update

        torch.manual_seed(0)
        args = Args(**options)
        q_network, target_network = (QNetwork(4, 2, args.quantiles, args.atoms) for _ in range(2))
        update = Update(args, q_network, target_network)
        found = []
        for _ in range(LOSSES):
            update.set_learning_rate(1e-3)
            batch = Batch(
                torch.randn(32, 4), torch.randint(2, (32,)), torch.randn(32), torch.randn(32, 4), torch.rand(32) < 0.1
            )
            found.append(update(batch).item())
        return found

    def test_same_as_eager(self) -> None:
        assert_same_losses(self.losses(loss="fused"), self.losses(loss="eager"))

    @pytest.mark.graph
    def test_compiled_same_as_eager(self) -> None:
        torch._dynamo.reset()
        assert_same_losses(self.losses(loss="fused", compile=True), self.losses(loss="eager"))

    def test_quantiles_same_as_eager(self) -> None:
        assert_same_losses(self.losses(loss="fused", quantiles=8), self.losses(loss="eager", quantiles=8))

    def test_atoms_same_as_eager(self) -> None:
        assert_same_losses(self.losses(loss="fused", atoms=9), self.losses(loss="eager", atoms=9))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device serves it")
    def test_a_cuda_graph_needs_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from examples.cartpole import parse_args

        monkeypatch.setattr(sys, "argv", ["cartpole.py", "--cuda-graph"])
        with pytest.raises(SystemExit):
            parse_args()
        assert "need a CUDA device, and there is none" in capsys.readouterr().err

    @pytest.mark.gpu
    def test_a_captured_update_is_the_plain_one(self) -> None:
        from examples.cartpole import Args, Batch, GraphedUpdate, QNetwork, Update

        def batch() -> Batch:
            obs, next_obs = torch.randn(2, 128, 4, device="cuda")
            actions, terminated = torch.randint(2, (128,), device="cuda"), torch.rand(128, device="cuda") < 0.1
            return Batch(obs, actions, torch.randn(128, device="cuda"), next_obs, terminated)

        weights: list[list[Tensor]] = []
        for graphed in (False, True):
            torch.manual_seed(0)
            q_network, target_network = QNetwork(4, 2).cuda(), QNetwork(4, 2).cuda()
            plain = Update(Args(cuda_graph=True, device="cuda"), q_network, target_network)
            update = GraphedUpdate(plain) if graphed else plain
            for step in range(20):
                plain.set_learning_rate(1e-3 / (1 + step))
                loss = update(batch())
            weights.append([loss.clone(), *(p.detach().clone() for p in q_network.parameters())])
        assert_agree(*weights)


def trained(name: str, processes: int, folder: Path, *options: str) -> list[Tensor]:
    """Weights of each rank after some steps of an example, started as torchrun does."""
    folder.mkdir()
    command = [str(ROOT / "examples" / f"{name}.py"), "--steps", "5", "--save", str(folder), *options]
    if "--amp" not in options:  # autocast leaves float64 as it is
        command.insert(0, str(ROOT / "tests/in_float64.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    else:  # what torchrun would set
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.processes
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_ddp_is_one_process_on_the_joined_batch(weighted: bool, tmp_path: Path) -> None:
    options = ["--batch-size", "32", *(["--weighted"] if weighted else [])]
    (alone,) = trained("ddp", 1, tmp_path / "1", *options)
    first, second = trained("ddp", 2, tmp_path / "2", *options)
    assert torch.equal(first, second), "the ranks hold different weights"
    assert_agree(first, alone)


class TestMicroBatches:
    @staticmethod
    def gradients(
        parts: int, dtype: torch.dtype = torch.float32, amp: torch.dtype | None = None, size: int = 50
    ) -> Tensor:
        from examples.micro_batches import QNetwork, accumulate, joined_batch

        torch.manual_seed(0)
        target, model = QNetwork().to(dtype), QNetwork().to(dtype)
        data = {name: x.to(dtype) if x.is_floating_point() else x for name, x in joined_batch(size, step=0).items()}
        loss = accumulate(model, target, data, parts, amp)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([loss.reshape(1), *grads]).double()

    @pytest.mark.parametrize("parts", [2, 7, 50])
    def test_the_whole_batch_in_float64(self, parts: int) -> None:
        """Unequal parts, too, and weights: the mean of their means would be off in the second digit."""
        whole = self.gradients(1, torch.float64)
        assert_agree(self.gradients(parts, torch.float64), whole)

    @pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_as_exact_as_the_whole_batch(self, amp: torch.dtype | None) -> None:
        """Each part rounds its own gradients, which are then added up in float32."""
        torch.set_default_dtype(torch.float32)  # so that the weights are those of float32 in all
        exact = self.gradients(1, torch.float64)
        whole, parts = ((self.gradients(n, amp=amp) - exact).square().mean().sqrt() for n in (1, 7))
        rounding = exact.square().mean().sqrt() * torch.finfo(amp or torch.float32).eps
        assert whole > 0
        assert parts <= 2 * whole + rounding

    @pytest.mark.processes
    @pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
    def test_processes(self, tmp_path: Path) -> None:
        """With AMP as far from float32 as one process with the whole batch is, which rounds as often."""
        size = ("--batch-size", "48", "--micro-batches")
        (alone,) = trained("micro_batches", 1, tmp_path / "1", *size, "1")
        first, second = trained("micro_batches", 2, tmp_path / "2", *size, "5")
        assert torch.equal(first, second), "the ranks hold different weights"
        assert_agree(first, alone)
        (amp,) = trained("micro_batches", 1, tmp_path / "amp1", *size, "1", "--amp")
        first, second = trained("micro_batches", 2, tmp_path / "amp2", *size, "5", "--amp")
        assert torch.equal(first, second), "the ranks hold different weights"
        assert 0 < (first - alone).norm() <= 2 * (amp - alone).norm()

    def test_one_all_reduce_a_step(self, tmp_path: Path) -> None:
        """no_sync: DDP's hook runs once for all micro-batches. A group of one rank is enough to see it."""
        from examples.micro_batches import QNetwork, accumulate, joined_batch

        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            pytest.skip("torch without torch.distributed or gloo")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        try:
            model = torch.nn.parallel.DistributedDataParallel(QNetwork())
            calls = []

            def hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
                calls.append(bucket.index())
                future: torch.futures.Future[Tensor] = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            model.register_comm_hook(None, hook)
            accumulate(model, QNetwork(), joined_batch(24, step=0), 4)
            assert len(calls) == len(set(calls)) > 0
        finally:
            torch.distributed.destroy_process_group()


EXAMPLES = (
    "sb3_dqn", "sb3_qrdqn", "torchrl_dqn", "cleanrl_dqn", "ddp", "micro_batches", "cartpole", "large_actions",
    "token_q_learning",
)  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example says what it takes."""
    import runpy

    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert stopped.value.code == 0
    assert "--" in capsys.readouterr().out


def test_token_q_learning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fused and the eager losses of a few updates are the same curve; the picture is drawn."""
    import runpy

    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    small = ["--steps", "12", "--vocabulary", "700", "--features", "8", "--length", "5", "--batch-size", "3"]
    monkeypatch.setattr(sys, "argv", ["token_q_learning", *small, "--plot", str(tmp_path / "curve.png")])
    runpy.run_path(str(ROOT / "examples/token_q_learning.py"), run_name="__main__")
    out = capsys.readouterr().out
    apart = re.search(r"furthest apart: (\S+) of a loss", out)
    assert apart is not None
    assert float(apart[1]) < 1e-3
    assert (tmp_path / "curve.png").stat().st_size > 0
