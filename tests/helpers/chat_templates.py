"""Chat templates in the forms that common models have, after their model cards."""

from dataclasses import dataclass, field

ANSWER = "So 1 + 2 is \\boxed{3}."


@dataclass(frozen=True, eq=False)
class Family:
    """A model family's template and tokens, and how it writes an answer.

    before: the text between the user's message and the answer in training, if the template writes
    it. given: the part of it that the generation prompt contains.
    """

    name: str
    template: str
    special: tuple[str, ...]
    eos: str
    before: str
    given: str
    end: str
    stop: str | None  # the token that ends the turn
    bos: str | None = None
    metaspace: bool = False
    arguments: dict = field(default_factory=dict)
    system: bool = True  # the template accepts a system message


def turns(user: str, system: str, assistant: str, prompt: str, start: str = "") -> str:
    """A template with one line for each role, in which § is replaced by the content."""

    def line(role: str, text: str) -> str:
        left, _, right = text.partition("§")
        return f"{{%- if m['role'] == '{role}' -%}}{{{{ {left!r} + m['content'] + {right!r} }}}}{{%- endif -%}}"

    body = line("system", system) + line("user", user) + line("assistant", assistant)
    return (
        f"{{{{ {start!r} }}}}{{%- for m in messages -%}}{body}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{ {prompt!r} }}}}{{%- endif -%}}"
    )


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = turns(
    "<|im_start|>user\n§<|im_end|>\n",
    "<|im_start|>system\n§<|im_end|>\n",
    "<|im_start|>assistant\n§<|im_end|>\n",
    "<|im_start|>assistant\n",
)
THOUGHT = (
    "{%- set p = m['content'].split('</think>') -%}"
    "{%- if p | length > 1 -%}{%- set r = p[0].split('<think>')[-1].strip('\n') -%}{%- set a = p[-1].lstrip('\n') -%}"
    "{%- else -%}{%- set r = '' -%}{%- set a = m['content'] -%}{%- endif -%}"
)
QWEN3 = (
    "{%- for m in messages -%}{%- if m['role'] != 'assistant' -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- else -%}"
    + THOUGHT
    + "{%- if loop.last -%}{{ '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + a }}"
    "{%- else -%}{{ '<|im_start|>assistant\n' + a }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
)
QWEN3_END = "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
LLAMA3 = (
    "{%- if strftime_now is defined -%}{%- set d = strftime_now('%d %b %Y') -%}{%- else -%}{%- set d = '26 Jul 2024' -%}{%- endif -%}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + d + '\n\n<|eot_id|>' }}"
    "{%- for m in messages -%}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
GEMMA = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
GEMMA4 = (
    "{{ bos_token }}{%- for m in messages -%}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<|turn>' + role + '\n' + (m['content'] if m['content'] is string else m['content'][0]['text']) | trim + '<turn|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|turn>model\n' }}"
    "{%- if not enable_thinking | default(false) -%}{{ '<|channel>thought\n<channel|>' }}{%- endif -%}{%- endif -%}"
)
R1 = (
    "{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- elif m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}{%- else -%}{{ m['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}"
)
HARMONY = (
    "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{%- if loop.last and not add_generation_prompt -%}{{ '<|return|>' }}{%- else -%}{{ '<|end|>' }}{%- endif -%}"
    "{%- else -%}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)
PARTS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}{%- for part in m['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
GEMMA3 = (
    "{{ bos_token }}{%- set first = '' -%}{%- set rest = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
QWEN35 = (
    "{%- for m in messages -%}{%- if m['role'] == 'system' and not loop.first -%}{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}{%- endfor -%}"
    "{%- if not messages | selectattr('role', 'equalto', 'user') | list -%}{{ raise_exception('No user query found in messages.') }}{%- endif -%}"
    + QWEN3.replace("m['content']", "(m['content'] | trim)")
    + "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- else -%}{{ '<think>\n' }}{%- endif -%}{%- endif -%}"
)
SMOLLM3 = (
    "{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' -%}"
    "{%- set own = '' -%}{%- set rest = messages -%}{%- if messages[0].role == 'system' -%}{%- set own = messages[0].content -%}{%- set rest = messages[1:] -%}{%- endif -%}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n\n' + own + '<|im_end|>\n' }}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{%- elif m.role == 'assistant' -%}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}{%- endif -%}"
)
NEMOTRON = (
    "{%- for m in messages -%}{%- if m['role'] != 'assistant' -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- else -%}"
    "{{ '<|im_start|>assistant\n' + ('' if '<think>' in m['content'] else '<think></think>') + m['content'] + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + ('<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n') }}{%- endif -%}"
)
GLM = (
    "[gMASK]<sop>{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{{ '<|assistant|>\n' + ('' if '<think>' in m.content else '<think></think>\n') + m.content | trim }}"
    "{%- else -%}{{ '<|' + m.role + '|>\n' + m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
MISTRAL_DATED = (
    "{%- set own = 'You are Mistral. The current date is ' + strftime_now('%Y-%m-%d') + '.' -%}{%- set rest = messages -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set own = messages[0]['content'] -%}{%- set rest = messages[1:] -%}{%- endif -%}"
    "{{ bos_token + '[SYSTEM_PROMPT]' + own + '[/SYSTEM_PROMPT]' }}{%- for m in rest -%}"
    "{%- if m['role'] == 'user' -%}{{ '[INST]' + m['content'] + '[/INST]' }}{%- else -%}{{ m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
WITH_LAST_QUERY = (
    "{%- if tools %}{{ tools|tojson }}{%- endif %}{%- set ns = namespace(more=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.more and m.role == 'user' and m.content is string and not (m.content.startswith('<t>') "
    "and m.content.endswith('</t>')) %}{%- set ns.more = false %}{%- set ns.last = i %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{- '[' + m.role + ']' + content + ';' }}"
    "{%- elif m.role == 'assistant' %}{%- set r = '' %}{%- if m.reasoning_content is string %}"
    "{%- set r = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set r = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or r) %}{{- '(' + r.strip('\n') + ')' }}{%- endif %}"
    "{{- '[a]' + content.lstrip('\n') + ';' }}{%- elif m.content %}{{- m.content|trim ~ ';' }}{%- endif %}{%- endfor %}"
)
"""As Qwen 3's: which user's turn is the last one depends on the texts, and where a thought ends."""
EOS_LAST = "{%- if add_generation_prompt -%}{{ §§ }}{%- else -%}{{ eos_token }}{%- endif -%}"
INST = turns("[INST] § [/INST]", "§\n\n", " §</s>", "", "<s>")
S2 = ("<unk>", "<s>", "</s>")


def command_r(name: str, opening: str, closing: str) -> Family:
    """Cohere's. The 7B writes its answer between two tokens, so a turn ends with two."""
    bos, start, end = "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    roles = user, system, own = "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"
    before = f"{start}{own}{opening}"
    template = turns(
        f"{start}{user}§{end}", f"{start}{system}§{end}", f"{before}§{closing}{end}", before, bos
    )
    special = (bos, start, end, *roles, *filter(None, (opening, closing)))
    return Family(name, template, special, end, "", "", closing + end, end, bos=bos)


FAMILIES = [
    Family("ChatML", CHATML, IM, "<|im_end|>", "", "", "<|im_end|>", "<|im_end|>"),
    Family(
        "ChatML, eos elsewhere", CHATML, IM, "<|endoftext|>", "", "", "<|im_end|>", "<|im_end|>"
    ),
    Family(
        "Qwen 3, thinking",
        QWEN3 + QWEN3_END,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "",
        "<|im_end|>",
        "<|im_end|>",
    ),
    Family(
        "Qwen 3, not thinking",
        QWEN3 + QWEN3_END,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "<|im_end|>",
        "<|im_end|>",
        arguments={"enable_thinking": False},
    ),
    Family(
        "Qwen 3 2507, thinking alone",
        QWEN3 + "{{ '<think>\n' }}{%- endif -%}",
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "<think>\n",
        "<|im_end|>",
        "<|im_end|>",
    ),
    Family("Llama 2", INST, S2, "</s>", " ", "", "</s>", "</s>", bos="<s>", metaspace=True),
    Family(
        "Llama 3",
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|end_of_text|>",
        ),
        "<|end_of_text|>",
        "",
        "",
        "<|eot_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    Family(
        "Gemma 1 to 3",
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "",
        "",
        "<end_of_turn>",
        "<end_of_turn>",
        bos="<bos>",
        system=False,
    ),
    Family(
        "Gemma 4",
        GEMMA4,
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        "<eos>",
        "<|channel>thought\n<channel|>",
        "<|channel>thought\n<channel|>",
        "<turn|>",
        "<turn|>",
        bos="<bos>",
    ),
    Family(
        "Mistral v1",
        turns("[INST] § [/INST]", "§\n\n", "§</s>", "", "<s>"),
        S2,
        "</s>",
        "",
        "",
        "</s>",
        "</s>",
        bos="<s>",
        metaspace=True,
    ),
    Family(
        "Mistral v3",
        turns("[INST] §[/INST]", "§\n\n", " §</s>", "", "<s>"),
        (*S2, "[INST]", "[/INST]"),
        "</s>",
        " ",
        "",
        "</s>",
        "</s>",
        bos="<s>",
        metaspace=True,
    ),
    Family(
        "Mistral v7 and later",
        turns("[INST]§[/INST]", "[SYSTEM_PROMPT]§[/SYSTEM_PROMPT]", "§</s>", "", "<s>"),
        (*S2, "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
        "",
        "",
        "</s>",
        "</s>",
        bos="<s>",
    ),
    Family(
        "Phi-3",
        turns(
            "<|user|>\n§<|end|>\n",
            "<|system|>\n§<|end|>\n",
            "<|assistant|>\n§<|end|>\n",
            "<|assistant|>\n",
        ),
        ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "",
        "",
        "<|end|>",
        "<|end|>",
        metaspace=True,
    ),
    Family(
        "Phi-4",
        turns(
            "<|im_start|>user<|im_sep|>§<|im_end|>",
            "<|im_start|>system<|im_sep|>§<|im_end|>",
            "<|im_start|>assistant<|im_sep|>§<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        (*IM, "<|im_sep|>"),
        "<|im_end|>",
        "",
        "",
        "<|im_end|>",
        "<|im_end|>",
    ),
    Family(
        "DeepSeek R1",
        R1,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<think>\n\n</think>\n\n",
        "<think>\n",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    Family(
        "DeepSeek V3",
        turns(
            "<｜User｜>§",
            "§",
            "<｜Assistant｜>§<｜end▁of▁sentence｜>",
            "<｜Assistant｜>",
            "<｜begin▁of▁sentence｜>",
        ),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "",
        "",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    Family(
        "gpt-oss",
        HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|endoftext|>"),
        "<|return|>",
        "<|channel|>final<|message|>",
        "",
        "<|return|>",
        "<|return|>",
    ),
    Family(
        "Granite",
        turns(
            "<|start_of_role|>user<|end_of_role|>§<|end_of_text|>\n",
            "<|start_of_role|>system<|end_of_role|>§<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>§<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "",
        "",
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
    Family(
        "Zephyr",
        turns(
            "<|user|>\n§</s>\n", "<|system|>\n§</s>\n", "<|assistant|>\n§</s>\n", "<|assistant|>\n"
        ),
        S2,
        "</s>",
        "",
        "",
        "</s>",
        "</s>",
        bos="<s>",
        metaspace=True,
    ),
    command_r("Command-R", "", ""),
    command_r("Command-R 7B", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    Family(
        "Phi-4 mini",  # writes EOS after the last turn, not as a part of it
        turns("<|user|>§<|end|>", "<|system|>§<|end|>", "<|assistant|>§<|end|>", "")
        + EOS_LAST.replace("§§", "'<|assistant|>'"),
        ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "",
        "",
        "<|end|>",
        "<|end|>",
    ),
    Family(
        "Phi-3, EOS last",
        turns("<|user|>\n§<|end|>\n", "<|system|>\n§<|end|>\n", "<|assistant|>\n§<|end|>\n", "")
        + EOS_LAST.replace("§§", "'<|assistant|>\n'"),
        ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        "",
        "",
        "<|end|>",
        "<|end|>",
        metaspace=True,
    ),
    Family(
        "Gemma 3",
        GEMMA3,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "",
        "",
        "<end_of_turn>",
        "<end_of_turn>",
        bos="<bos>",
    ),
    Family(
        "Qwen 3.5, thinking",
        QWEN35,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "<think>\n",
        "<|im_end|>",
        "<|im_end|>",
    ),
    Family(
        "Qwen 3.5, not thinking",
        QWEN35,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "<|im_end|>",
        "<|im_end|>",
        arguments={"enable_thinking": False},
    ),
    Family("SmolLM3, thinking", SMOLLM3, IM, "<|im_end|>", "", "", "<|im_end|>", "<|im_end|>"),
    Family(
        "SmolLM3, not thinking",
        SMOLLM3,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n",
        "<think>\n\n</think>\n",
        "<|im_end|>",
        "<|im_end|>",
        arguments={"enable_thinking": False},
    ),
    Family(
        "Nemotron 3",
        NEMOTRON,
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        "<think>\n",
        "<|im_end|>",
        "<|im_end|>",
    ),
    Family(
        "Nemotron 3, not thinking",
        NEMOTRON,
        IM,
        "<|im_end|>",
        "<think></think>",
        "<think></think>",
        "<|im_end|>",
        "<|im_end|>",
        arguments={"enable_thinking": False},
    ),
    Family(
        "GLM 4.5",  # a turn ends where the next one begins
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>"),
        "<|endoftext|>",
        "\n<think></think>\n",
        "",
        "",
        None,
    ),
    Family(
        "Mistral Small 3.1",
        MISTRAL_DATED,
        (*S2, "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "</s>",
        "",
        "",
        "</s>",
        "</s>",
        bos="<s>",
    ),
    Family("lists of parts", PARTS, IM, "<|im_end|>", "", "", "<|im_end|>", "<|im_end|>"),
    Family(
        "no turn end",
        turns("User: §\n", "§\n", "Assistant: §\n", "Assistant:"),
        ("<|endoftext|>",),
        "<|endoftext|>",
        " ",
        "",
        "",
        None,
    ),
    Family(
        "no turn end, prompt with a space",
        turns("### Q:\n§\n\n", "§\n", "### A:\n§\n\n", "### A:\n"),
        ("<|endoftext|>",),
        "<|endoftext|>",
        "",
        "",
        "",
        None,
    ),
]


IM_ROLES = ("<|im_start|>user\n§<|im_end|>", "<|im_start|>system\n§<|im_end|>")


def of_fields(prompt, thought, answer, start="<|im_start|>assistant\n"):
    """A template with the assistant's thought in a field of the message; § is replaced by the
    texts.
    """
    return (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        f"{{{{ {start!r} }}}}"
        f"{{%- if m.reasoning_content -%}}{{{{ {thought!r}.replace('§', m.reasoning_content) }}}}{{%- endif -%}}"
        f"{{{{ {answer!r}.replace('§', m.content) }}}}{{%- else -%}}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {prompt!r} }}}}{{%- endif -%}}"
    )


A, END = "<|im_start|>assistant\n", "<|im_end|>"
PARTS_OF_THOUGHT = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for p in m.content -%}{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
CLOSED = turns(*IM_ROLES, f"{A}<|START_TEXT|>§{END}", f"{A}<|START_THINKING|><|END_THINKING|>")
FORMS = {  # template: the targets of an answer with a thought and without
    # gpt-oss
    of_fields(A, "<|channel|>analysis<|message|>§<|end|>", f"<|channel|>final<|message|>§{END}"): (
        f"<|channel|>analysis<|message|>We add.<|end|><|channel|>final<|message|>{ANSWER}{END}",
        f"<|channel|>final<|message|>{ANSWER}{END}",
    ),
    # Seed-OSS
    of_fields(A, "<seed:think>§</seed:think>", f"§{END}"): (
        f"<seed:think>We add.</seed:think>{ANSWER}{END}",
        f"{ANSWER}{END}",
    ),
    # Ministral 3
    PARTS_OF_THOUGHT: (f"[THINK]We add.[/THINK]{ANSWER}{END}", f"{ANSWER}{END}"),
    # Command A Reasoning, whose thought begins with its own words
    of_fields(
        f"{A}<|START_THINKING|>", "<|START_THINKING|>§<|END_THINKING|>", f"<|START_TEXT|>§{END}"
    ): (
        f"We add.<|END_THINKING|><|START_TEXT|>{ANSWER}{END}",
        f"<|END_THINKING|><|START_TEXT|>{ANSWER}{END}",
    ),
    # Command R7B
    CLOSED: (f"<|START_TEXT|>{ANSWER}{END}", f"<|START_TEXT|>{ANSWER}{END}"),
    # Kimi K2 Thinking, whose finished answers have an empty thought
    turns(*IM_ROLES, f"{A}<think></think>§{END}", A): (
        f"<think>\nWe add.\n</think>\n\n{ANSWER}{END}",
        f"<think></think>{ANSWER}{END}",
    ),
    # Bielik, which writes the end of the thought differently
    CHATML.replace("m['content']", "m['content'].replace('</think>\n\n', '</think>\n')"): (
        f"<think>\nWe add.\n</think>\n{ANSWER}{END}",
        f"{ANSWER}{END}",
    ),
}
"""Templates that write an answer's thought in unusual ways."""

ENDS = {  # template: (the end of the turn, the target)
    # Command A always begins the next turn
    turns(*IM_ROLES, f"{A}§{END}", "") + "{{ '<|im_start|>assistant\n' }}": (END, f"{ANSWER}{END}"),
    # Apertus writes the end only before another turn
    turns(*IM_ROLES, f"{A}§", A).replace(
        "{{ '<|im_start|>user", "{{ ('' if loop.first else '<|stop|>') + '<|im_start|>user"
    ): ("<|stop|>", f"{ANSWER}<|stop|>"),
    # GLM's next turn begins with a token, but no token ends a turn
    turns(*IM_ROLES, f"{A}§", A): ("", f"{ANSWER}{END}"),
}
"""Templates in which the end of a turn is not the last special token."""
