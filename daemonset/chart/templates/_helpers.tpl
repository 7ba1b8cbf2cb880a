{{- define "cachd.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of every object. 40 characters leave room for a pool, a kind and what Kubernetes adds. */}}
{{- define "cachd.fullname" -}}
{{- $name := include "cachd.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{ .Values.fullnameOverride | default $full | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "cachd.selector" -}}
app.kubernetes.io/name: {{ include "cachd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cachd.labels" -}}
{{ include "cachd.selector" . }}
app.kubernetes.io/part-of: cachd
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of pods that are no daemon: the Service and the DaemonSets must not select them. */}}
{{- define "cachd.jobLabels" -}}
app.kubernetes.io/name: {{ include "cachd.name" .root }}-{{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: cachd
{{- end }}

{{- define "cachd.image" -}}
{{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "cachd.secret" -}}
{{ .Values.secrets.name | default (include "cachd.fullname" .) }}
{{- end }}

{{- define "cachd.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "cachd.fullname" .) "default") }}
{{- end }}

{{/* Whether any signal of the nodes is on: "yes" or nothing. */}}
{{- define "cachd.nodeSignals" -}}
{{- with .Values.nodeSignals }}{{ if or .labels .condition .events .startupTaint }}yes{{ end }}{{ end }}
{{- end }}

{{/* The name of the node, which the daemon tells Kubernetes about. */}}
{{- define "cachd.nodeName" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end }}

{{/* Whether the cluster has a kind or a field: (list . "1.30") gives "yes" or nothing. */}}
{{- define "cachd.since" -}}
{{- if semverCompare (printf ">=%s.0-0" (index . 1)) (index . 0).Capabilities.KubeVersion.Version }}yes{{ end }}
{{- end }}

{{/* A container without rights. */}}
{{- define "cachd.noRights" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{/* The pools by name; without any, one whose name is empty. */}}
{{- define "cachd.pools" -}}
{{ .Values.pools | default (dict "" (dict)) | toYaml }}
{{- end }}

{{/* The name of a pool's objects: (dict "root" . "pool" NAME). */}}
{{- define "cachd.poolName" -}}
{{ include "cachd.fullname" .root }}{{ with .pool }}-{{ . }}{{ end }}
{{- end }}

{{- define "cachd.poolLabels" -}}
{{ include "cachd.selector" .root }}
{{- with .pool }}
cachd.dev/pool: {{ . }}
{{- end }}
{{- end }}

{{/* The daemon's options in a pool: the chart's, then those of `config`, then the pool's own. */}}
{{- define "cachd.config" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $service := include "cachd.fullname" $root -}}
{{- $hosts := list $service -}}
{{- range list "" ".svc" ".svc.cluster.local" -}}
{{- $hosts = append $hosts (printf "%s.%s%s" $service $root.Release.Namespace .) -}}
{{- end -}}
{{- $listen := list (printf "%s:8470" $values.bindAddress) -}}
{{- $own := dict "root" "/var/lib/cachd" "token_file" "/etc/cachd/secrets/token" -}}
{{- if $values.tls.secretName -}}
{{- $listen = append $listen (printf "%s:8471 read-only plain" $values.bindAddress) -}}
{{- $listen = append $listen "unix:/tmp/cachd.sock" -}}
{{- $_ := merge $own (dict "tls_cert_file" "/etc/cachd/tls/tls.crt" "tls_key_file" "/etc/cachd/tls/tls.key") -}}
{{- if $values.tls.clientCa -}}
{{- $_ := set $own "tls_client_ca_file" "/etc/cachd/tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- if $values.unixSocket.enabled -}}
{{- $listen = append $listen (printf "unix:/run/cachd/cachd.sock group=%d" (int $values.unixSocket.group)) -}}
{{- end -}}
{{- $_ := set $own "listen" (eq (len $listen) 1 | ternary (first $listen) $listen) -}}
{{- with $values.hubEndpoint -}}
{{- if .enabled -}}
{{- $_ := merge $own (dict "hub_listen" (printf "%s:8472" $values.bindAddress) "hub_allow" .allow "hub_share" .share) -}}
{{- end -}}
{{- end -}}
{{- if $values.kubelet -}}
{{- $_ := set $own "kubelet_config" "/etc/cachd/kubelet.yaml" -}}
{{- end -}}
{{- with $values.nodeSignals -}}
{{- range $key, $value := dict "node_labels" .labels "node_condition" .condition "node_events" .events "startup_taint" .startupTaint -}}
{{- if $value -}}
{{- $_ := set $own $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $given := mergeOverwrite (dict) (deepCopy $values.config) (deepCopy (.settings.config | default (dict))) -}}
{{- $hosts = concat $hosts ($given.allowed_hosts | default (list)) -}}
{{- $config := mergeOverwrite $own $given (dict "allowed_hosts" $hosts) -}}
{{- $_ := set $config "models" (concat $values.models (.settings.models | default (list)) | default (list)) -}}
{{ toYaml $config }}
{{- end }}

{{/* What the daemon reads at its start alone. The keys that are left out are reloaded while it runs. */}}
{{- define "cachd.restartKeys" -}}
{{- $config := include "cachd.config" . | fromYaml -}}
{{ omit $config "models" "allow" "refuse" "sources" "limit_bytes" "limit_bytes_per_second" "source_limits" "reserve_free" "reserve_inodes" "kubelet_thresholds" | toYaml }}
{{ .root.Values.kubelet | toYaml }}
{{- end }}

{{/* The port and the listener that the kubelet and Prometheus ask. */}}
{{- define "cachd.probePort" -}}
{{ empty .Values.tls.secretName | ternary "http" "probes" }}
{{- end }}
