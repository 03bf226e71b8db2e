"""The names that fields have in the data sets and tools of the field, and what each stands for.

Sources: the ``columns`` and ``tags`` of LLaMA-Factory, the prompt strategies of axolotl, the dataset formats of TRL and mlx-lm, and the
columns of the data sets that are loaded most. Next file: ``data/shapes/record.py``.
"""

from __future__ import annotations

__all__ = ["ANSWERS", "CONTENTS", "CONTEXTS", "QUESTIONS", "ROLES_OF", "SAYERS", "SYSTEMS", "TEXTS", "TURNS"]

# A whole conversation, beside ``messages``.
TURNS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")
# What was asked, and what is to be answered. ``input`` is a question only where no other stands beside it.
QUESTIONS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "problem",
    "user",
    "human",
    "inputs",
    "article",
    "document",
    "input",
)
CONTEXTS = ("input", "context")  # put behind what was asked
ANSWERS = ("completion", "output", "response", "answer", "solution", "assistant", "target", "targets", "outputs", "generation",
           "summary", "gpt")  # fmt: skip
SYSTEMS = ("system", "system_prompt", "system_message")
TEXTS = ("text", "content")
# In a turn: who says it, and what.
SAYERS = ("role", "from", "speaker")
CONTENTS = ("content", "value", "text")
ROLES_OF = {
    "human": "user", "prompter": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "chatbot": "assistant", "ai": "assistant", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function_call": "function_call",
    "tool_call": "function_call",
}  # fmt: skip
