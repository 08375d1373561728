#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Ask a device with Mosquitto's own tools: examples/ask_over_mqtt.sh HOST PORT DEVICE QUESTION
# The question is put into JSON as it is: it must hold neither quotes nor backslashes.
set -eu
host=$1 port=$2 device=$3 question=$4
me=shell-$$
id=ask-$(date +%s)-$$
folder=$(mktemp -d)
mkfifo "$folder/answers"
exec 3<>"$folder/answers"

mosquitto_sub -h "$host" -p "$port" -q 1 -t "edgecascade/v1/c/$me/r/$device/#" >&3 &
trap 'kill $!; rm -r "$folder"' EXIT
sleep 1
mosquitto_pub -h "$host" -p "$port" -q 1 -t "edgecascade/v1/d/$device/chat/$me" -m \
    "{\"id\":\"$id\",\"stream\":true,\"max_completion_tokens\":32,
      \"messages\":[{\"role\":\"user\",\"content\":\"$question\"}]}"

while read -r message <&3; do
    printf '%s\n' "$message"
    case $message in *'"finish_reason"'* | *'"error"'*) break ;; esac
done
