// OpenAI's own client for Node: its tool runner over chat completions, and a loop over responses.
import OpenAI from "openai";

const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = ({ city }) => `sunny in ${city}`;

async function chat(client) {
  const tool = { name: "weather", description: "The weather of a city.", parameters, parse: JSON.parse };
  const runner = client.chat.completions.runTools({
    model: "default",
    stream: true,
    stream_options: { include_usage: true },
    messages: [{ role: "user", content: "How is the weather?" }],
    tools: [{ type: "function", function: { ...tool, function: weather } }],
  });
  const pieces = [];
  runner.on("content", (piece) => pieces.push(piece));
  const text = await runner.finalContent();
  const usage = await runner.totalUsage();
  return { text, pieces, usage: [usage.prompt_tokens, usage.completion_tokens] };
}

async function responses(client) {
  const tools = [{ type: "function", name: "weather", parameters, strict: false }];
  const pieces = [];
  const usage = [0, 0];
  let input = "How is the weather?";
  let previous;
  for (;;) {
    const asked = { model: "default", input, tools, previous_response_id: previous };
    const stream = client.responses.stream(asked);
    stream.on("response.output_text.delta", (event) => pieces.push(event.delta));
    const answer = await stream.finalResponse();
    usage[0] += answer.usage.input_tokens;
    usage[1] += answer.usage.output_tokens;
    const calls = answer.output.filter((item) => item.type === "function_call");
    if (!calls.length) return { text: answer.output_text, pieces, usage };
    previous = answer.id;
    input = calls.map((call) => ({
      type: "function_call_output",
      call_id: call.call_id,
      output: weather(JSON.parse(call.arguments)),
    }));
  }
}

async function plain(client) {
  const stream = await client.chat.completions.create({
    model: "default",
    stream: true,
    stream_options: { include_usage: true },
    messages: [{ role: "user", content: "Name three colours." }],
    max_tokens: 24,
  });
  const pieces = [];
  let usage;
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) pieces.push(chunk.choices[0].delta.content);
    if (chunk.usage) usage = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens];
  }
  return { text: pieces.join(""), pieces, usage };
}

const given = process.argv.slice(2);
while (given.length) {
  const [root, task] = given.splice(0, 2);
  const client = new OpenAI({ baseURL: `${root}/v1`, apiKey: "any", maxRetries: 0 });
  console.log(JSON.stringify(await { chat, responses, plain }[task](client)));
}
