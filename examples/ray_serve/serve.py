"""Replicas of an engine behind Ray Serve: each batches and chooses its ratio, Ray starts as many as the load needs.

python examples/ray_serve/serve.py MODEL --adapter DIR --table latency.json --ask "a text"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


try:
    import ray
    from ray import serve
except ImportError as error:
    raise SystemExit("This example needs Ray: pip install 'ray[serve]'") from error
from starlette.requests import Request
from starlette.responses import JSONResponse

from peft_variator.runtime import EngineClosed, QueueFull, ServeSettings, make_engine


@serve.deployment(max_ongoing_requests=256)
class Embedder:
    """One replica: one model, one engine.

    Args:
        settings: what is served. With a latency table in a file, no replica measures one while others run.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.engine = make_engine(settings)

    async def embed(self, texts: list[str], **limits: Any) -> dict[str, Any]:
        """For other deployments, by their handle. `limits`: `slo_ms`, `min_quality`, `max_ratio`."""
        result = await self.engine.aembed(texts, **limits)
        return {"embeddings": result.embeddings.tolist(), "ratios": result.ratios, "late": result.late}

    async def __call__(self, request: Request) -> JSONResponse:
        """`POST` of `{"texts": […]}`, with the limits beside it."""
        try:
            return JSONResponse(await self.embed(**await request.json()))
        except (TypeError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 422)
        except QueueFull as error:
            return JSONResponse({"error": str(error)}, 429)
        except EngineClosed as error:
            return JSONResponse({"error": str(error)}, 503)

    async def __del__(self) -> None:
        """Ray calls it when the replica has answered what it was given."""
        await asyncio.to_thread(self.engine.close)


def ask(port: int, text: str) -> dict[str, Any]:
    """One question over HTTP."""
    body = json.dumps({"texts": [text]}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", body, timeout=60) as answer:
        return dict(json.load(answer))


def main() -> None:
    """Start the replicas; ask them, or serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--table", help="latency table (JSON), measured on one of these machines")
    parser.add_argument("--slo-ms", type=float, default=50.0)
    parser.add_argument("--max-replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of a replica; so many threads torch has there")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--ask", help="ask this text 32 times at once, say what came, and end")
    arguments = parser.parse_args()
    ray.init(include_dashboard=False)  # on a cluster: ray.init("auto")
    serve.start(http_options={"port": arguments.port})
    settings = ServeSettings(arguments.model, arguments.adapter, table=arguments.table, slo_ms=arguments.slo_ms)
    scaled = Embedder.options(
        ray_actor_options={"num_cpus": arguments.cpus},
        autoscaling_config={"min_replicas": 1, "max_replicas": arguments.max_replicas, "target_ongoing_requests": 16},
    )
    try:
        handle = serve.run(scaled.bind(settings))
        if arguments.ask is None:
            while True:
                time.sleep(1)
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, [arguments.port] * 32, [arguments.ask] * 32))
        print(f"{len(answers)} answers, vectors of {len(answers[0]['embeddings'][0])}, at the ratios", end=" ")
        print(sorted({answer["ratios"][0] for answer in answers}))
        print("By handle:", handle.embed.remote([arguments.ask], max_ratio=1).result()["ratios"])
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
