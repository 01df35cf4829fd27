"""LiteLLM, as frameworks use it: streamed chat completions, put together by its own builder."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
import litellm

litellm.suppress_debug_info = True  # it prints hints among the answers
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


def ask(root, messages, pieces, usage, **asked):
    chunks = []
    for chunk in litellm.completion(
        model="openai/default",
        api_base=f"{root}/v1",
        api_key="any",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        num_retries=0,
        **asked,
    ):
        chunks.append(chunk)
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
    answer = litellm.stream_chunk_builder(chunks, messages=messages)
    usage[0] += answer.usage.prompt_tokens
    usage[1] += answer.usage.completion_tokens
    return answer.choices[0].message


def run(root, task):
    pieces, usage = [], [0, 0]
    if task == "plain":
        message = ask(root, [{"role": "user", "content": "Name three colours."}], pieces, usage, max_tokens=24)
        return {"text": message.content, "pieces": pieces, "usage": usage}
    messages = [{"role": "user", "content": "How is the weather?"}]
    while (message := ask(root, messages, pieces, usage, tools=[WEATHER])).tool_calls:
        messages.append(message.model_dump())
        for call in message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"})
    return {"text": message.content, "pieces": pieces, "usage": usage}


for root, task in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print(json.dumps(run(root, task)))
