// The Vercel AI SDK: chat completions through its provider for compatible servers, responses through that for OpenAI.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

async function said(asked) {
  const result = streamText({
    ...asked,
    maxRetries: 0,
    onError: ({ error }) => {
      throw error;
    },
  });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  const usage = await result.totalUsage;
  return { text: await result.text, pieces, usage: [usage.inputTokens, usage.outputTokens] };
}

const withTools = { prompt: "How is the weather?", tools: { weather }, stopWhen: isStepCount(4) };
const compatible = (options) => createOpenAICompatible({ ...options, name: "ocserve", includeUsage: true })("default");
const tasks = {
  chat: (options) => said({ ...withTools, model: compatible(options) }),
  responses: (options) => said({ ...withTools, model: createOpenAI(options)("default") }),
  plain: (options) => said({ model: compatible(options), prompt: "Name three colours.", maxOutputTokens: 24 }),
};
const given = process.argv.slice(2);
while (given.length) {
  const [root, task] = given.splice(0, 2);
  console.log(JSON.stringify(await tasks[task]({ baseURL: `${root}/v1`, apiKey: "any" })));
}
