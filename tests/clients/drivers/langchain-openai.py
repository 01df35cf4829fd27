"""LangChain's ChatOpenAI: chunks are added up as its agents do, over chat completions and over responses."""

import json
import sys

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def ask(model, messages, pieces, usage):
    whole = None
    for chunk in model.stream(messages):
        if chunk.text:
            pieces.append(str(chunk.text))
        whole = chunk if whole is None else whole + chunk
    usage[0] += whole.usage_metadata["input_tokens"]
    usage[1] += whole.usage_metadata["output_tokens"]
    return whole


def run(root, task):
    asked = {"max_tokens": 24} if task == "plain" else {"use_responses_api": task == "responses"}
    model = ChatOpenAI(model="default", base_url=f"{root}/v1", api_key="any", max_retries=0, stream_usage=True, **asked)
    pieces, usage = [], [0, 0]
    if task == "plain":
        answer = ask(model, [HumanMessage("Name three colours.")], pieces, usage)
    else:
        messages = [HumanMessage("How is the weather?")]
        while (answer := ask(model.bind_tools([weather]), messages, pieces, usage)).tool_calls:
            messages += [answer, *(weather.invoke(call) for call in answer.tool_calls)]
    return {"text": str(answer.text), "pieces": pieces, "usage": usage}


for root, task in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print(json.dumps(run(root, task)))
