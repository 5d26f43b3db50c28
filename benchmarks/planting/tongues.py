"""Sentences in eight languages other than English, with places for names, towns and numbers, so that no two records are alike."""

from __future__ import annotations

import random

_NAMES = {
    "latin": ("Anna", "Karl", "Sofia", "Marco", "Elena", "Jonas", "Clara", "Hugo", "Teresa", "Felix", "Nadia", "Oscar"),
    "Russian": ("Анна", "Борис", "Светлана", "Игорь", "Ольга", "Павел", "Мария", "Никита"),
    "Chinese": ("王伟", "李娜", "张敏", "刘洋", "陈静", "杨帆", "赵磊", "周婷"),
}
_TOWNS = {
    "latin": ("Berlin", "Lyon", "Madrid", "Roma", "Porto", "Utrecht", "Torino", "Sevilla", "Bremen", "Gent", "Braga", "Nantes"),
    "Russian": ("Москве", "Казани", "Самаре", "Омске", "Перми", "Туле"),
    "Chinese": ("北京", "上海", "广州", "成都", "武汉", "南京"),
}

#: {n} a name, {t} a town, {k} a number above two.
SENTENCES: dict[str, tuple[str, ...]] = {
    "German": (
        "Ich habe die Karte vor {k} Tagen bestellt, aber sie ist noch nicht angekommen.",
        "{n} kauft auf dem Markt in {t} {k} Äpfel und gibt die Hälfte ihrer Schwester.",
        "Wie viele Bücher stehen jetzt noch im Regal?",
        "Können Sie mir bitte erklären, warum der Zug nach {t} schon wieder Verspätung hat?",
        "Gestern waren wir mit {k} Freunden im Garten und haben bis spät gegrillt.",
        "Das Geld wurde abgebucht, obwohl der Verkäufer die Zahlung abgelehnt hat.",
        "Wenn {n} jeden Tag {k} Seiten liest, wird sie bald mit dem Roman fertig sein.",
        "Die Antwort steht auf der letzten Seite und ist leicht zu verstehen.",
    ),
    "French": (
        "J'ai commandé la carte il y a {k} jours, mais je ne l'ai toujours pas reçue.",
        "{n} achète {k} pommes au marché de {t} et en donne la moitié à sa sœur.",
        "Combien de livres reste-t-il maintenant sur l'étagère ?",
        "Pouvez-vous m'expliquer pourquoi le train pour {t} est encore en retard ?",
        "Hier, nous étions {k} amis dans le jardin et nous avons mangé très tard.",
        "L'argent a été débité alors que le vendeur avait refusé le paiement.",
        "Si {n} lit {k} pages par jour, elle aura bientôt fini son roman.",
        "La réponse se trouve à la dernière page et elle est facile à comprendre.",
    ),
    "Spanish": (
        "Pedí la tarjeta hace {k} días, pero todavía no me ha llegado.",
        "{n} compra {k} manzanas en el mercado de {t} y le da la mitad a su hermana.",
        "¿Cuántos libros quedan ahora en la estantería?",
        "¿Me puede explicar por qué el tren a {t} llega otra vez con retraso?",
        "Ayer estuvimos con {k} amigos en el jardín y cenamos muy tarde.",
        "Me cobraron el dinero aunque el vendedor rechazó el pago.",
        "Si {n} lee {k} páginas al día, pronto terminará la novela.",
        "La respuesta está en la última página y es fácil de entender.",
    ),
    "Italian": (
        "Ho ordinato la carta {k} giorni fa, ma non è ancora arrivata.",
        "{n} compra {k} mele al mercato di {t} e ne regala la metà a sua sorella.",
        "Quanti libri rimangono adesso sullo scaffale?",
        "Mi può spiegare perché il treno per {t} è di nuovo in ritardo?",
        "Ieri eravamo in giardino con {k} amici e abbiamo cenato molto tardi.",
        "I soldi sono stati addebitati anche se il venditore ha rifiutato il pagamento.",
        "Se {n} legge {k} pagine al giorno, finirà presto il romanzo.",
        "La risposta si trova nell'ultima pagina ed è facile da capire.",
    ),
    "Portuguese": (
        "Pedi o cartão há {k} dias, mas ele ainda não chegou.",
        "{n} compra {k} maçãs na feira de {t} e dá metade à sua irmã.",
        "Quantos livros ainda estão na estante agora?",
        "Pode explicar-me por que razão o comboio para {t} está outra vez atrasado?",
        "Ontem estivemos no jardim com {k} amigos e jantámos muito tarde.",
        "O dinheiro foi debitado embora o vendedor tenha recusado o pagamento.",
        "Se {n} ler {k} páginas por dia, vai terminar o romance em breve.",
        "A resposta está na última página e é fácil de perceber.",
    ),
    "Dutch": (
        "Ik heb de kaart {k} dagen geleden besteld, maar hij is nog niet aangekomen.",
        "{n} koopt {k} appels op de markt in {t} en geeft de helft aan haar zus.",
        "Hoeveel boeken staan er nu nog op de plank?",
        "Kunt u mij uitleggen waarom de trein naar {t} alweer vertraging heeft?",
        "Gisteren zaten we met {k} vrienden in de tuin en we hebben heel laat gegeten.",
        "Het geld is afgeschreven terwijl de verkoper de betaling heeft geweigerd.",
        "Als {n} elke dag {k} bladzijden leest, is de roman binnenkort uit.",
        "Het antwoord staat op de laatste bladzijde en is makkelijk te begrijpen.",
    ),
    "Russian": (
        "Я заказал карту {k} дней назад, но она до сих пор не пришла.",
        "{n} покупает на рынке в {t} {k} яблок и отдаёт половину соседям.",
        "Сколько книг теперь осталось на полке?",
        "Объясните, пожалуйста, почему поезд снова опаздывает?",
        "Вчера мы с друзьями долго сидели в саду и ужинали очень поздно.",
        "Деньги списали, хотя продавец отклонил платёж.",
        "Если читать по {k} страниц в день, роман скоро закончится.",
        "Ответ находится на последней странице, и его легко понять.",
    ),
    "Chinese": (
        "我{k}天前申请了银行卡,但是到现在还没有收到。",
        "{n}在{t}的市场买了{k}个苹果,把一半送给了妹妹。",
        "现在书架上还剩下多少本书?",
        "请问开往{t}的火车为什么又晚点了?",
        "昨天我们和{k}个朋友在花园里吃饭,一直聊到很晚。",
        "虽然商家拒绝了付款,但是钱还是被扣了。",
        "如果{n}每天读{k}页,这本小说很快就能读完。",
        "答案在最后一页,很容易理解。",
    ),
}


def speak(tongue: str, sentences: int, rng: random.Random) -> str:
    """Some sentences of a language, no two alike."""
    script = tongue if tongue in _NAMES else "latin"
    chosen = rng.sample(SENTENCES[tongue], sentences)
    return ("" if tongue == "Chinese" else " ").join(
        sentence.format(n=rng.choice(_NAMES[script]), t=rng.choice(_TOWNS[script]), k=rng.randint(3, 60)) for sentence in chosen
    )
