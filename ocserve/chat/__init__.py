"""Text conventions of models: from messages to the text, and the control tokens, that a model was trained on."""
