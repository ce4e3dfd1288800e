"""Routes of `/v1/review`, on which readers answer referred images of a bulk run, and their page `/review`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from fastapi.responses import FileResponse

from scalp_core.errors import ImageError, UserError
from scalp_core.review.readers import Reader
from serving.api.authorization import REVIEW_PATH as PATH
from serving.api.web import PAGE_OF_REVIEW
from serving.auth.keys import Keys
from serving.auth.scopes import REVIEW
from serving.http import request_context
from serving.http.openapi import problem_responses
from serving.http.problems import CODES, Refusal, refuse_image
from serving.replicas.handles import DeploymentClient
from serving.replicas.ingress import Replica
from serving.replicas.reviewer import ReviewProblem
from serving.schemas.review import (
    Revealed,
    ReviewAnswer,
    ReviewImage,
    ReviewNeighbors,
    ReviewProgress,
    ReviewSettings,
    ReviewState,
)

_OF_IMAGES = problem_responses(404, 413, 415, 422)

router = APIRouter(tags=["review"])


class _Jpeg(Response):
    media_type = "image/jpeg"


class _Png(Response):
    media_type = "image/png"


def check_readers(review: ReviewSettings | None, keys: Keys) -> None:
    """Check that the endpoint has keys, if it offers a review.

    Raises:
        UserError: It has none.
    """
    if review and not keys:
        raise UserError(
            "a review is set, but the endpoint has no keys, which name the readers; add --keys FILE, with "
            f"keys of the scope {REVIEW}"
        )


class ReviewClient:
    """The review of the caller, in the deployment Reviewer."""

    def __init__(self, client: DeploymentClient, reader: Reader, seconds: float) -> None:
        self._client = client
        self._reader = reader
        self._seconds = seconds

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `Reviewer` for the caller.

        Raises:
            Refusal: The reviewer refuses it, or does not answer in time.
        """
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._client.call(method, self._reader, *arguments)
        except TimeoutError:
            raise Refusal(504, "too_slow", f"no answer within {self._seconds:g} s; try again") from None
        if isinstance(answer, ImageError):
            raise refuse_image(answer)
        if isinstance(answer, ReviewProblem):
            raise Refusal(CODES[answer.code].statuses[0], answer.code, answer.detail)
        return answer

    async def call_for(self, image_id: str, method: str, *arguments: Any) -> Any:
        """As `call`, for an image, which the audit log then names; reads are logged too."""
        request = request_context.current()
        request.owes_audit = True
        answer = await self.call(method, image_id, *arguments)
        request.image = image_id
        return answer


async def review_client(replica: Replica) -> ReviewClient:
    """Dependency: the review of the caller, who is the owner of the key.

    Raises:
        Refusal: The endpoint offers no review (404).
    """
    caller = request_context.current().caller
    if replica.reviewer is None or caller.key is None:
        raise Refusal(
            404,
            "review_not_offered",
            "no review is turned on; start with scalp serve --keys FILE --review GRADED "
            "--review-labels LABELS, or set review in the application's args",
        )
    reader = Reader(caller.key, caller.rights.adjudicate)
    return ReviewClient(replica.reviewer, reader, replica.settings.answer_seconds)


CallersReview = Annotated[ReviewClient, Depends(review_client)]
ImageId = Annotated[str, Path(description="id of an image of the review")]


@router.get(PATH, response_model=ReviewState, responses=problem_responses(404))
async def review(reviews: CallersReview) -> Any:
    """Open the review of the caller: the referred images without an answer of this key, in order.

    With the scope adjudicate: the images on which readers disagree. Images that the key answered since the
    endpoint started stay, so that the answers can be corrected.
    """
    return await reviews.call("open")


@router.get(f"{PATH}/images/{{id}}", response_model=ReviewImage, responses=problem_responses(404))
async def review_image(reviews: CallersReview, id: ImageId) -> Any:  # noqa: A002
    """Describe an image, as far as its reader may know it: no location, and no answers of others."""
    return await reviews.call("image", id)


@router.get(
    f"{PATH}/images/{{id}}/picture",
    response_class=_Jpeg,
    responses={
        200: {"description": "the pixels of the image, encoded again, without metadata"},
        **_OF_IMAGES,
    },
)
async def review_picture(reviews: CallersReview, id: ImageId) -> _Jpeg:  # noqa: A002
    """Get the picture of an image: upright, without metadata, at most 2,048 pixels wide and high."""
    return _Jpeg(await reviews.call_for(id, "picture"))


@router.post(
    f"{PATH}/images/{{id}}/answer", response_model=ReviewProgress, responses=problem_responses(404, 422)
)
async def review_answer(reviews: CallersReview, id: ImageId, body: ReviewAnswer) -> Any:  # noqa: A002
    """Save an answer. It is durable in the label log when the endpoint answers; the newest answer counts."""
    return await reviews.call_for(id, "answer", body)


@router.post(f"{PATH}/images/{{id}}/reveal", responses=problem_responses(404))
async def review_reveal(reviews: CallersReview, id: ImageId) -> Revealed:  # noqa: A002
    """Record that the caller sees the model's view of an image, in which later answers are marked."""
    return Revealed(saw_model=await reviews.call_for(id, "reveal"))


@router.get(
    f"{PATH}/images/{{id}}/heatmap",
    response_class=_Png,
    responses={
        200: {"description": "a transparent picture of the model's square"},
        **_OF_IMAGES,
        **problem_responses(409),
    },
)
async def review_heatmap(reviews: CallersReview, id: ImageId) -> _Png:  # noqa: A002
    """Get the heatmap of the model's answer, after the caller has asked for the model's view."""
    return _Png(await reviews.call_for(id, "heatmap"))


@router.get(
    f"{PATH}/images/{{id}}/neighbors",
    response_model=ReviewNeighbors,
    responses={**_OF_IMAGES, **problem_responses(409)},
)
async def review_neighbors(reviews: CallersReview, id: ImageId) -> Any:  # noqa: A002
    """Get training images that look alike, with their grades, after the caller asked for the model's view."""
    return {"neighbors": await reviews.call_for(id, "neighbors")}


@router.get("/review", include_in_schema=False)
async def page() -> FileResponse:
    """The web page of readers."""
    return FileResponse(PAGE_OF_REVIEW)
