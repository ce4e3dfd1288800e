"""Deployment of a whole endpoint in one process, with its grader, explainer and reviewer."""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle

from serving.replicas.explainer import Explainer
from serving.replicas.grader import Grader
from serving.replicas.handles import LocalHandle
from serving.replicas.ingress import CreateApi, Ingress
from serving.replicas.reviewer import SCALING, Reviewer
from serving.settings import Settings


class CombinedGrader(Ingress):
    """Grader that serves HTTP itself; its `user_config` is that of `Grader`.

    The first heatmap loads the model of heatmaps.
    """

    def __init__(
        self, settings: Settings, create_api: CreateApi, candidate: DeploymentHandle | None = None
    ) -> None:
        self._model = Grader(settings)
        super().__init__(
            settings,
            LocalHandle(self._model, settings.grader),
            LocalHandle(Explainer(), settings.explainer),
            create_api,
            candidate,
            LocalHandle(Reviewer(settings.review), SCALING) if settings.review else None,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply `ModelSettings`, as `Grader.reconfigure`."""
        await self._model.reconfigure(user_config)

    async def check_health(self) -> None:
        """Check the model, as `Grader.check_health`."""
        await self._model.check_health()
