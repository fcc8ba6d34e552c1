"""Deep Q-learning: the data are made by the network that they train."""

import random
from collections import deque

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Corridor:
    """A walk of nine fields: at the right end there is a reward, at the left end there is none."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.place, self.steps = 4, 0
        return self.seen()

    def seen(self):
        return torch.nn.functional.one_hot(torch.tensor(self.place), 9).float()

    def step(self, action):
        self.place += 1 if action else -1
        self.steps += 1
        reward = 1.0 if self.place == 8 else 0.0
        return self.seen(), reward, self.place in (0, 8) or self.steps == 30


class Experiences(IterableDataset):
    """Draws from what was experienced so far, anew in each epoch."""

    def __init__(self, memory, count):
        self.memory, self.count = memory, count

    def __iter__(self):
        yield from random.sample(list(self.memory), self.count)


class DQN(L.LightningModule):
    def __init__(self, lr=0.01, gamma=0.9, sync=7, batch_size=8, count=44):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.target = self.make(), self.make()
        self.target.load_state_dict(self.net.state_dict())
        self.memory = deque(maxlen=300)
        self.world = Corridor()
        self.state, self.rewards, self.losses = self.world.reset(), [0.0], []

    def make(self):
        return nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    @torch.no_grad()
    def play(self, epsilon):
        action = random.randrange(2)
        if random.random() >= epsilon:
            action = int(self(self.state.to(self.device)).argmax())
        following, reward, done = self.world.step(action)
        self.memory.append((self.state, action, reward, done, following))
        self.state = self.world.reset() if done else following
        self.rewards[-1] += reward
        if done:
            self.rewards.append(0.0)

    def on_fit_start(self):
        for _ in range(60):
            self.play(epsilon=1.0)

    def training_step(self, batch, batch_idx):
        states, actions, rewards, done, following = batch
        self.play(epsilon=max(0.1, 1.0 - self.global_step / 20))
        chosen = self(states).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            best = self.target(following).amax(1)
            best[done] = 0.0
        expected = rewards.float() + self.hparams.gamma * best
        loss = nn.functional.mse_loss(chosen, expected)
        if self.global_step % self.hparams.sync == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.losses.append(loss.detach())
        self.log("steps", float(self.global_step), logger=False, prog_bar=True)
        self.log("loss", loss, batch_size=self.hparams.batch_size)
        return loss

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)]

    def train_dataloader(self):
        data = Experiences(self.memory, self.hparams.count)
        return DataLoader(data, batch_size=self.hparams.batch_size)


def main(folder, **options):
    L.seed_everything(9)
    task = DQN()
    trainer = L.Trainer(
        max_epochs=6,
        max_steps=33,
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task)
    return {
        "losses": task.losses,
        "rewards": task.rewards,
        "steps": trainer.global_step,
        "memory": len(task.memory),
        "weights": [p.detach() for p in task.net.parameters()],
    }
