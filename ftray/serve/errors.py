"""Errors on their way out: OpenAI's shape for the client, type and place alone for the log."""

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ftray.core.errors import FtrayError, RequestError
from ftray.serve.backend import Unavailable
from ftray.serve.replies import error_body
from ftray.serve.stream import ClientGone


class PassingError(FtrayError):
    """Something here that may be well again the next time, said without its details."""


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: a network, a disk, an engine's step; not what a delta's files hold."""
    if not isinstance(error, FtrayError):
        return True
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError | PassingError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def install(app: FastAPI, *, spelled: bool = False) -> None:
    """Answer every exception of the handlers in OpenAI's shape.

    Args:
        app: the application.
        spelled: whether its clients read the words of every `FtrayError`, which may name files of this machine.
    """
    app.add_exception_handler(RequestError, _on_request_error)
    if spelled:
        app.add_exception_handler(FtrayError, _on_mistake)
        app.add_exception_handler(OSError, _on_mistake)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(Unavailable, _on_unavailable)
    app.add_exception_handler(Exception, _on_exception)


def internal() -> RequestError:
    """A mistake of ours; the client learns no more."""
    return RequestError("internal error", status=500, code="internal_error")


def unavailable(message: str) -> RequestError:
    """The engine is gone for now."""
    return RequestError(message, status=503, code="unavailable")


def response(error: RequestError) -> Response:
    """An error as a response."""
    headers = {"retry-after": str(error.retry_after_s)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response(error)


async def _on_mistake(request: Request, error: Exception) -> Response:
    text = " ".join(str(error).split())
    if is_passing(error):
        return response(RequestError(text, status=503, code="unavailable"))
    return response(RequestError(text))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = RequestError(str(error.detail), status=error.status_code, code="invalid_request")
    answer = response(problem)
    answer.headers.update(error.headers or {})
    return answer


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_exception(request: Request, error: Exception) -> Response:
    return response(internal())  # raised again after this, and logged by the shell


async def _on_unavailable(request: Request, error: Exception) -> Response:
    return response(unavailable("the engine is not available; try again shortly"))


def described(error: BaseException) -> str:
    """Type and place of an error for the log. Its message may quote a prompt, so it stays out."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "unknown place"
    return f"{type(error).__name__} at {where}"
