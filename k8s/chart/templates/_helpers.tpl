{{- define "cachewise.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "cachewise.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "cachewise.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "cachewise.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "cachewise.vllm" -}}
{{- include "cachewise.fullname" . }}-vllm
{{- end }}

{{- define "cachewise.selector" -}}
app.kubernetes.io/name: {{ include "cachewise.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "cachewise.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "cachewise.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: cachewise
{{- end }}

{{- define "cachewise.serviceAccount" -}}
{{- default (include "cachewise.fullname" .) .Values.gateway.serviceAccount.name }}
{{- end }}

{{- define "cachewise.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The Secret, and whether it holds a key. */}}
{{- define "cachewise.secret" -}}
{{- .Values.secrets.existingSecret | default (include "cachewise.fullname" .) }}
{{- end }}

{{/* An environment variable from a key of the Secret; of one that exists already the key may lack. */}}
{{- define "cachewise.secretEnv" -}}
{{- if or .root.Values.secrets.existingSecret .value }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ include "cachewise.secret" .root }}
      key: {{ .key }}
      {{- if .root.Values.secrets.existingSecret }}
      optional: true
      {{- end }}
{{- end }}
{{- end }}

{{/* Whether the gateway watches the Kubernetes API. */}}
{{- define "cachewise.watches" -}}
{{- $config := include "cachewise.config" . | fromYaml }}
{{- if eq (dig "discovery" "kind" "static" $config) "kubernetes" }}true{{ end }}
{{- end }}

{{/* The gateway's settings. */}}
{{- define "cachewise.config" -}}
{{- $config := dict "host" "0.0.0.0" "port" 8080 "shutdown_grace_s" .Values.gateway.drainSeconds "log" (dict "format" "json") "forecast" (dict "state_file" "/var/lib/cachewise/forecast.npz") }}
{{- if .Values.vllm.enabled }}
{{- $labels := include "cachewise.selector" (dict "root" . "component" "vllm") | fromYaml }}
{{- $selector := list }}
{{- range $key, $value := $labels }}
{{- $selector = append $selector (printf "%s=%s" $key $value) }}
{{- end }}
{{- $discovery := dict "kind" "kubernetes" "service" (include "cachewise.vllm" .) "selector" (join "," $selector) "namespace" .Release.Namespace }}
{{- if gt (int .Values.vllm.dataParallelSize) 1 }}
{{- $_ := set $discovery "dp_ranks" (int .Values.vllm.dataParallelSize) }}
{{- end }}
{{- if .Values.vllm.kvEvents }}
{{- $_ := set $discovery "kv_events_port" 5557 }}
{{- $_ := set $discovery "kv_events_replay_port" 6557 }}
{{- end }}
{{- $_ := set $config "discovery" $discovery }}
{{- $aliases := dict }}
{{- range $name, $served := .Values.vllm.aliases }}
{{- $_ := set $aliases $name ($served | default $.Values.vllm.model) }}
{{- end }}
{{- if $aliases }}
{{- $_ := set $config "models" (dict "aliases" $aliases) }}
{{- end }}
{{- else if not (or .Values.gateway.config.pods (ne (dig "discovery" "kind" "static" .Values.gateway.config) "static")) }}
{{- fail "vllm.enabled is false and no vLLM is named; set gateway.config.pods, or gateway.config.discovery" }}
{{- end }}
{{- if or .Values.secrets.apiKeys .Values.secrets.existingSecret }}
{{- $_ := set $config "access" (dict "api_keys_file" "/etc/cachewise/secret/api-keys") }}
{{- end }}
{{- if .Values.gateway.recording.enabled }}
{{- $_ := set $config "record" (dict "directory" (include "cachewise.recordings" .)) }}
{{- end }}
{{- toYaml (mustMergeOverwrite $config (deepCopy .Values.gateway.config)) }}
{{- end }}

{{- define "cachewise.recordings" -}}
/var/lib/cachewise/recordings
{{- end }}

{{- define "cachewise.port" -}}
{{- $config := include "cachewise.config" . | fromYaml }}
{{- int $config.port }}
{{- end }}

{{- define "cachewise.scheme" -}}
{{- $config := include "cachewise.config" . | fromYaml }}
{{- if dig "tls" "certfile" "" $config }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{/* The address of vLLM's image. */}}
{{- define "cachewise.vllmImage" -}}
{{ .Values.vllm.image.repository }}:{{ .Values.vllm.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "cachewise.gatewayEnv" -}}
{{- include "cachewise.secretEnv" (dict "root" . "name" "CACHEWISE_ACCESS__ADMIN_TOKEN" "key" "admin-token" "value" .Values.secrets.adminToken) }}
{{- include "cachewise.secretEnv" (dict "root" . "name" "CACHEWISE_ACCESS__POD_API_KEY" "key" "pod-api-key" "value" .Values.secrets.podApiKey) }}
{{- include "cachewise.secretEnv" (dict "root" . "name" "CACHEWISE_HINTS__TOKEN" "key" "hints-token" "value" .Values.secrets.hintsToken) }}
{{- include "cachewise.secretEnv" (dict "root" . "name" "CACHEWISE_REDIS_URL" "key" "redis-url" "value" .Values.secrets.redisUrl) }}
{{- with .Values.gateway.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Ports of the KV events: one for each data-parallel rank, and as many for replays. */}}
{{- define "cachewise.eventPorts" -}}
{{- if .Values.vllm.kvEvents }}
{{- $more := sub (int .Values.vllm.dataParallelSize) 1 | int }}
- {port: 5557, endPort: {{ add 5557 $more }}}
- {port: 6557, endPort: {{ add 6557 $more }}}
{{- end }}
{{- end }}
