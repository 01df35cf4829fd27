"""Simon Willison's llm through its Python interface; servers are told to it in its users' way, in a YAML file."""

import json
import os
import sys
from pathlib import Path

GIVEN = list(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
os.environ["LLM_USER_PATH"] = "."
Path("extra-openai-models.yaml").write_text(
    "".join(
        f"- model_id: {task}\n  model_name: default\n  api_base: {root}/v1\n  supports_tools: true\n"
        f"  responses: {str(task == 'responses').lower()}\n"
        for root, task in GIVEN
    )
)
import llm  # noqa: E402  (it reads its settings now)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def run(task):
    model = llm.get_model(task)
    if task == "plain":
        response = model.prompt("Name three colours.", max_tokens=24)
        pieces, responses = list(response), [response]
    else:
        chain = model.chain("How is the weather?", tools=[weather])
        pieces, responses = list(chain), list(chain.responses())
    usage = [response.usage() for response in responses]
    total = [sum(each.input for each in usage), sum(each.output for each in usage)]
    return {"text": responses[-1].text(), "pieces": pieces, "usage": total}


for _, task in GIVEN:
    print(json.dumps(run(task)))
