# The keys of the policy file, as options. Types say what can be said before the build; the build
# asks `spokeguard policy check` about the rest, whose word is final.
{ lib, pkgs, host }:
let
  inherit (lib) mkOption types;

  port = types.ints.between 1 65535;
  option =
    type: default: description:
    mkOption { inherit type default description; };
  needed = type: description: mkOption { inherit type description; };

  ports = proto: option (types.listOf port) [ ] "${proto} ports.";
  texts = types.listOf types.str;
  sources = types.either (types.enum [
    "hub"
    "mesh"
  ]) texts;
  from =
    description:
    mkOption {
      type = types.nullOr sources;
      default = null;
      inherit description;
    };
  duration = types.strMatching "[0-9]+ ?[a-z]+";
in
rec {
  # Tables below a key: one, or a list of them.
  elements = {
    "mesh.hub" = {
      address = needed (types.either types.str texts) "The hub's addresses in the mesh.";
      public_key = option (types.nullOr types.singleLineStr) null "Its WireGuard public key.";
      endpoint = option (types.nullOr types.str) null "Its address and port, never a name.";
    };
    "mesh.service" = {
      name = needed types.str "Its name in reports and metrics.";
      tcp = ports "TCP";
      udp = ports "UDP";
      from = from "`\"mesh\"` (the default), `\"hub\"` or a list of prefixes.";
    };
    "local" = {
      name = needed types.str "Its name in reports.";
      interfaces = needed texts "Interfaces: whole names, or a beginning and a star (`\"docker*\"`).";
      tcp = ports "TCP";
      udp = ports "UDP";
    };
    "exception" = {
      name = needed types.str "Its name in reports.";
      tcp = ports "TCP";
      udp = ports "UDP";
      from = needed texts "Prefixes that it is for.";
      reason = needed types.str "Why there is a hole.";
      owner = option (types.nullOr types.str) null "Who answers for it.";
      until = needed (types.strMatching "[0-9]{4}-[0-9]{2}-[0-9]{2}") "Its last day, UTC.";
    };
    "file" = {
      path = needed types.str "A file with a secret in it.";
      mode = needed (types.strMatching "0?[0-7]{3}") "The most permissive mode allowed: `\"0600\"`.";
    };
  };

  # `policy`: the values of these very options, for defaults that depend on others.
  keys =
    let
      tables =
        name: description:
        option (types.listOf (types.submodule { options = elements.${name}; })) [ ] description;
    in
    policy: {
      version = option (types.enum [ 1 ]) 1 "Version of the policy's format.";

      node.name = mkOption {
        type = types.str;
        default = host.networking.hostName;
        defaultText = lib.literalExpression "config.networking.hostName";
        description = "This node's name: letters, digits and hyphens.";
      };
      node.role = option (types.enum [
        "spoke"
        "hub"
        "device"
      ]) "spoke" "Its role in the mesh.";

      mesh.kind = option (types.enum [
        "wireguard"
        "tailscale"
      ]) "wireguard" "What the mesh is made of.";
      mesh.interface = mkOption {
        type = types.str;
        default = if policy.mesh.kind == "wireguard" then "wg0" else host.services.tailscale.interfaceName;
        defaultText = lib.literalExpression ''"wg0" or config.services.tailscale.interfaceName'';
        description = "The tunnel's interface.";
      };
      mesh.address = option texts [ ] "This node's addresses in the mesh. Only Tailscale may leave them out.";
      mesh.prefix = option (types.nullOr texts) null "The mesh's prefixes. WireGuard needs them.";
      mesh.keepalive = mkOption {
        type = types.nullOr (types.strMatching "off|[0-9]+(s|m)");
        default = if policy.mesh.kind == "wireguard" && policy.node.role != "hub" then "25s" else null;
        defaultText = lib.literalExpression ''"25s", or null on a hub and with Tailscale'';
        description = "Persistent keepalive of every peer: seconds or minutes, or `\"off\"`.";
      };
      mesh.handshake_max_age = option duration "3m" "A handshake older than this is reported.";
      mesh.listen_port = mkOption {
        type = types.nullOr port;
        default =
          if policy.node.role != "hub" then
            null
          else if policy.mesh.kind == "wireguard" then
            51820
          else
            41641;
        defaultText = lib.literalExpression "51820 or 41641 on a hub, else null";
        description = "The tunnel's own UDP port, open to the public.";
      };
      mesh.hub = mkOption {
        type = types.nullOr (types.submodule { options = elements."mesh.hub"; });
        default = null;
        description = "The hub.";
      };
      mesh.tags = option (types.nullOr texts) null "Tags that this node must have (Tailscale).";
      mesh.tailscale_ssh = option (types.nullOr types.bool) null (
        "Whether tailscaled may serve ssh itself (Tailscale); by default it may not."
      );
      mesh.service = tables "mesh.service" "What is reachable through the mesh only.";

      public.tcp = option (types.listOf port) [ ] "TCP ports that anyone may reach; nothing else.";
      public.udp = option (types.listOf port) [ ] "UDP ports that anyone may reach.";
      public.interfaces = option (types.nullOr texts) null (
        "The public interfaces. Default: every one but lo, the mesh and the `local` ones."
      );

      ssh.port = option port 22 "The port of sshd.";
      ssh.bind = option (types.either (types.enum [ "mesh" ]) texts) "mesh" (
        "Where sshd listens: `\"mesh\"` or a list of addresses."
      );
      ssh.rebind = option types.bool false (
        "Move a wildcard bind of sshd to the mesh address instead of refusing it."
      );
      ssh.from = from "`\"hub\"`, `\"mesh\"` or a list of prefixes. By default whoever the role suggests.";

      local = tables "local" "LANs and container bridges: neither public nor mesh, each with its own list.";
      exception = tables "exception" "Declared holes: reported as accepted risk, never as OK.";
      file = tables "file" "Secrets that must not be readable by others.";

      enforce.mode = option (types.enum [
        "enforce"
        "audit"
      ]) "enforce" "`\"audit\"` counts what `\"enforce\"` drops.";
      enforce.firewall = option types.bool true "Keep the nftables table and the guard in force.";
      enforce.binds = option types.bool true "Refuse new listeners that the policy does not allow.";
      enforce.keepalive = option types.bool true "Repair the keepalive of WireGuard peers.";
      enforce.confirm_within = option duration "60s" (
        "How long a change is on trial before it is rolled back."
      );
      enforce.allow_no_admin_path = option types.bool false "Permit a policy that leaves no way in.";

      metrics.port = option port 9984 "Port of the metrics, on the mesh addresses, for the hub.";

      heartbeat.kuma_url_file = option (types.nullOr types.str) null (
        "Set by `services.spokeguard.kumaUrlFile`."
      );
      heartbeat.ntfy_url_file = option (types.nullOr types.str) null (
        "Set by `services.spokeguard.ntfyUrlFile`."
      );
      heartbeat.status_file = option (types.nullOr types.str) null (
        "File that every beat writes, for whoever polls a share."
      );
      heartbeat.app_file = option (types.nullOr types.str) null (
        "JSON of what only the application knows, passed on."
      );
      heartbeat.certificate_file = option (types.nullOr types.str) null (
        "PEM chain of the certificate that is served on port 443."
      );
      heartbeat.certificate_name = option (types.nullOr types.str) null (
        "Without a file: the name to ask port 443 for its certificate."
      );
      heartbeat.database_file = option (types.nullOr types.str) null (
        "A database, for its size."
      );
      heartbeat.every = option duration "30s" "Time between heartbeats.";
    };

  type = types.submodule (
    { config, ... }:
    {
      freeformType = (pkgs.formats.toml { }).type;
      options = keys config;
    }
  );

  # As the file has it: nothing that is not said, since TOML has no null.
  said =
    let
      said =
        value:
        if builtins.isAttrs value then
          builtins.mapAttrs (_: said) (lib.filterAttrs (_: v: v != null) value)
        else if builtins.isList value then
          map said value
        else
          value;
      # Empty lists of these say nothing; of others they may ("from = []" lets nobody in).
      without =
        names: set: lib.filterAttrs (name: v: !(v == [ ] && builtins.elem name names)) set;
    in
    policy:
    let
      all = said policy;
    in
    without [
      "local"
      "exception"
      "file"
    ] (all // {
      mesh = without [
        "address"
        "service"
      ] all.mesh;
    });
}
