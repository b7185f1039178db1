{{/* Names, settings and the parts that every pod has in common. */}}

{{/* The release's name, with the chart's name unless it holds it already; short enough for the longest suffix. */}}
{{- define "artifact-store.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels that never change in a release; selectors use them. Takes {root, component}. */}}
{{- define "artifact-store.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "artifact-store.labels" -}}
{{ include "artifact-store.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* The settings that are no secret, as a YAML map of texts. Helm reads numbers as floats: 5e12 must not stay one. */}}
{{- define "artifact-store.settings" -}}
{{- range $name := list "ARTIFACT_STORE_KAFKA_OPTIONS" "ARTIFACT_STORE_SCHEMA_REGISTRY_URL" -}}
{{- if and (get $.Values.secrets $name) (hasKey $.Values.settings $name) -}}
{{- fail (printf "give %s once: in settings or in secrets" $name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := .Values.settings }}
{{ $name }}: {{ if kindIs "map" $value }}{{ toJson $value | quote }}{{ else if kindIs "float64" $value }}{{ int64 $value | quote }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- end }}

{{/* Environment entries that point into existing Secrets. Takes {root, of, names}; `of` has the component's secretName. */}}
{{- define "artifact-store.secretEnv" -}}
{{- range $name := .names }}
{{- with get $.root.Values.secrets $name }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ .name | default $.of.secretName }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- end }}

{{- define "artifact-store.image" -}}
{{ required "image.repository is empty: build the image from Containerfile, push it to a registry of yours and name it here (docs/operating.md, Kubernetes)" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What every pod of every kind has in its spec. Service links would set ARTIFACT_STORE_PORT and others for a Service
of that name, and the program refuses ARTIFACT_STORE_* names that it does not know. */}}
{{- define "artifact-store.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What every container has. */}}
{{- define "artifact-store.container" -}}
image: {{ include "artifact-store.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* The account of a component; empty means the namespace's default one. Takes {root, component}. */}}
{{- define "artifact-store.serviceAccountName" -}}
{{- $name := .root.Values.serviceAccount.name -}}
{{- if .root.Values.serviceAccount.create }}{{ $name | default (include "artifact-store.fullname" .root) }}-{{ .component }}{{ else }}{{ $name }}{{ end -}}
{{- end }}

{{/* Certificates of a private authority, where aiohttp, the S3 SDK (both through OpenSSL's defaults) and asyncpg look. Kafka's
client looks nowhere by itself: its options name the file. The three parts go into env, volumeMounts and volumes. */}}
{{- define "artifact-store.trustEnv" -}}
{{- if .Values.trustedCertificates }}
- name: SSL_CERT_FILE
  value: /etc/artifact-store/trusted.pem
- name: PGSSLROOTCERT
  value: /etc/artifact-store/trusted.pem
{{- end }}
{{- end }}

{{- define "artifact-store.trustMount" -}}
{{- if .Values.trustedCertificates }}
- name: trusted
  mountPath: /etc/artifact-store
  readOnly: true
{{- end }}
{{- end }}

{{- define "artifact-store.trustVolume" -}}
{{- with .Values.trustedCertificates }}
- name: trusted
  configMap:
    name: {{ .name }}
    items: [{key: {{ .key }}, path: trusted.pem}]
{{- end }}
{{- end }}

{{/* Policy and tokens, which say who may do what. The processes that go by them must see the same. */}}
{{- define "artifact-store.rightsEnv" -}}
{{- if .Values.gateway.policy }}
- name: ARTIFACT_STORE_POLICY
  value: /etc/artifact-store-policy/policy.toml
{{- end }}
{{- if .Values.gateway.tokens }}
- name: ARTIFACT_STORE_TOKENS
  value: /etc/artifact-store-tokens/tokens
{{- end }}
{{- end }}

{{- define "artifact-store.rightsMount" -}}
{{- range $name := list "policy" "tokens" }}
{{- if get $.Values.gateway $name }}
- name: {{ $name }}
  mountPath: /etc/artifact-store-{{ $name }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{- define "artifact-store.rightsVolume" -}}
{{- with .Values.gateway.policy }}
- name: policy
  configMap:
    name: {{ .name }}
    items: [{key: {{ .key }}, path: policy.toml}]
{{- end }}
{{- with .Values.gateway.tokens }}
- name: tokens
  secret:
    secretName: {{ .name }}
    items: [{key: {{ .key }}, path: tokens}]
{{- end }}
{{- end }}

{{/* Spreads the pods of a component over nodes or zones, as far as there is room. Takes {root, component, of}. Pods of an
older version do not count: they are about to go. */}}
{{- define "artifact-store.spread" -}}
{{- with .of.spreadOver }}
topologySpreadConstraints:
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "artifact-store.selector" $ | nindent 8 }}
{{- end }}
{{- end }}

{{/* What a component's pods have in their spec besides. Takes {root, component, of}. */}}
{{- define "artifact-store.placement" -}}
{{- with include "artifact-store.serviceAccountName" (dict "root" .root "component" (splitList "-" .component | first)) }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ .of.terminationGracePeriodSeconds | int64 }}
{{- include "artifact-store.spread" . }}
{{- end }}

{{/* How many pods a component has. Where a scaler decides, it is the number that the cluster has: Helm would else reset it to
one when a scaler is turned on. Empty when there is no such workload yet. Takes {root, component, of, kind}. */}}
{{- define "artifact-store.replicas" -}}
{{- if not .of.autoscaling -}}
{{- .of.replicas | int64 -}}
{{- else -}}
{{- with lookup "apps/v1" .kind .root.Release.Namespace (printf "%s-%s" (include "artifact-store.fullname" .root) .component) -}}
{{- .spec.replicas | int64 -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The components that run, as a JSON list. */}}
{{- define "artifact-store.running" -}}
{{- $components := list "gateway" }}
{{- range .Values.projector.projections }}{{ $components = append $components (printf "projector-%s" .) }}{{ end }}
{{- if .Values.webhooks.enabled }}{{ $components = append $components "webhooks" }}{{ end }}
{{- toJson $components }}
{{- end }}
