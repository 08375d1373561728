# SPDX-License-Identifier: Apache-2.0
"""The chat format of the Nemotron-H family (docs/model.md), for checkpoints without a template."""

NEMOTRON_TEMPLATE = r"""
{%- macro value(v) -%}
  {{- v if v is string else v | tojson -}}
{%- endmacro -%}

{%- macro described(v) -%}
  {%- if v.description -%}
    {{- '\n<description>' + v.description | trim + '</description>' -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro others(schema, known) -%}
  {%- for key in schema if key not in known -%}
    {{- '\n<' + key + '>' + value(schema[key]) + '</' + key + '>' -}}
  {%- endfor -%}
{%- endmacro -%}

{%- macro tool_list(tools) -%}
  {{- '# Tools\n\nYou have access to the following functions:\n\n<tools>' -}}
  {%- for tool in tools -%}
    {%- set f = tool.function -%}
    {%- set parameters = f.parameters or {} -%}
    {{- '\n<function>\n<name>' + f.name + '</name>' + described(f) + '\n<parameters>' -}}
    {%- for name, schema in (parameters.properties or {}).items() -%}
      {{- '\n<parameter>\n<name>' + name + '</name>' -}}
      {%- if schema.type %}{{ '\n<type>' + value(schema.type) + '</type>' }}{% endif -%}
      {{- described(schema) -}}
      {%- if schema.enum %}{{ '\n<enum>' + schema.enum | tojson + '</enum>' }}{% endif -%}
      {{- others(schema, ['name', 'type', 'description', 'enum']) + '\n</parameter>' -}}
    {%- endfor -%}
    {{- others(parameters, ['type', 'properties', 'required']) + '\n</parameters>' -}}
    {%- if parameters.required -%}
      {{- '\n<required>' + parameters.required | tojson + '</required>' -}}
    {%- endif -%}
    {{- others(f, ['name', 'description', 'parameters']) + '\n</function>' -}}
  {%- endfor -%}
  {{- '\n</tools>\n\nTo call a function, answer in exactly this form and write nothing after it:'
      + '\n\n<tool_call>\n<function=name_of_the_function>\n<parameter=name_of_a_parameter>\n'
      + 'value, over several lines if need be\n</parameter>\n</function>\n</tool_call>\n\n'
      + 'Every required parameter must be given. Reasons may come before the call. If no function '
      + 'helps, answer in words and do not mention functions.' -}}
{%- endmacro -%}

{%- set ns = namespace(last_user=-1) -%}
{%- set chat = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in chat -%}
  {%- if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- set truncate = truncate_history_thinking is not defined or truncate_history_thinking -%}

{{- '<|im_start|>system\n' + system -}}
{%- if tools -%}
  {{- ('\n\n' if system else '') + tool_list(tools) -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}

{%- for m in chat -%}
  {%- if m.role == 'assistant' -%}
    {%- set content = m.content or '' -%}
    {%- set reasoning = m.reasoning_content or '' -%}
    {%- if '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
      {%- set content = content.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if reasoning and not (truncate and loop.index0 < ns.last_user) -%}
      {{- '<think>\n' + reasoning | trim + '\n</think>\n' -}}
    {%- else -%}
      {{- '<think></think>' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '\n' if content and loop.first -}}
      {{- '<tool_call>\n<function=' + call.function.name + '>\n' -}}
      {%- for name, v in call.function.arguments.items() -%}
        {{- '<parameter=' + name + '>\n' + value(v) + '\n</parameter>\n' -}}
      {%- endfor -%}
      {{- '</function>\n</tool_call>\n' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user\n' }}{% endif -%}
    {{- '<tool_response>\n' + m.content + '\n</tool_response>\n' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' -}}
{%- endif -%}
"""
